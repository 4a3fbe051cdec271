"""Put the finished runs of a dataset side by side, and keep their records if asked.

python reproduce.py
python reproduce.py --dataset my-data
python reproduce.py --record                          write results/runs/<dataset>-<run>.json, one record per run
"""

from pathlib import Path

from utils import assets, cli
from utils.data import Sequences
from utils.errors import UserError
from utils.files import write_json
from utils.report import comparison, finished_runs

RECORDS = cli.ROOT / "results" / "runs"


def main(*, dataset: str = "ml-100k", record: bool = False) -> None:
    data = Sequences.load(assets.dataset_folder(dataset))
    runs, left_out = finished_runs(cli.ROOT / "outputs" / data.name, data.fingerprint)
    print("\n".join(left_out), end="\n" if left_out else "")
    if not runs:
        raise UserError(
            f"outputs/{data.name} holds no finished run; make one: python train_sr_trad.py --dataset {dataset}"
        )
    for run in runs if record else []:
        write_json(run, RECORDS / f"{data.name}-{Path(run['config']['output_dir']).name}.json")
    print(comparison(runs))


if __name__ == "__main__":
    cli.run(main, section=None)
