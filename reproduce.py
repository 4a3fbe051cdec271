"""Gather the finished runs of a dataset into results/runs/, one record a run, and put them side by side.

python reproduce.py
python reproduce.py --dataset my-data
"""

from pathlib import Path

from utils import cli
from utils.errors import UserError
from utils.files import write_json
from utils.report import comparison, finished_runs

RECORDS = cli.ROOT / "results" / "runs"


def main(*, dataset: str = "ml-100k") -> None:
    name = Path(dataset).name
    runs = finished_runs(cli.ROOT / "outputs" / name)
    if not runs:
        raise UserError(f"outputs/{name} holds no finished run; make one: python train_sr_trad.py --dataset {dataset}")
    for run in runs:
        write_json(run, RECORDS / f"{name}-{Path(run['config']['output_dir']).name}.json")
    print(comparison(runs))


if __name__ == "__main__":
    cli.run(main, section="reproduce")
