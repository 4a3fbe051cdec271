"""What RecBole 1.2.1 makes of sequences: the part of `benchmarks/against_recbole.py` in RecBole's environment.

    python benchmarks/recbole/theirs.py train|time FOLDER MODEL SETTINGS

FOLDER holds sequences.json, the items of each user in order of time, and gets result.json. Each user's last item is
the test, the one before it the validation. `train`: RecBole trains and chooses the epoch by its own NDCG@10 on
validation; ranks are counted here from its scores: full ranking, seen items masked, ties against. `time`: seconds of
single steps of training.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed

FIXED = {
    "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item",
    "TIME_FIELD": "time",
    "load_col": {"inter": ["user", "item", "time"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "repeatable": True,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "use_gpu": False,
    "show_progress": False,
}


def write_interactions(sequences: list[list[int]], folder: Path) -> None:
    lines = [f"{user}\t{item}\t{at}" for user, items in enumerate(sequences) for at, item in enumerate(items)]
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "data.inter").write_text("\n".join(["user:token\titem:token\ttime:float", *lines]) + "\n")


@torch.no_grad()
def ranks(model, dataset, sequences: list[list[int]], length: int, target: int) -> list[int]:
    """Rank of item `target` (-1: test, -2: validation) of each user, from 0."""
    ids = [np.array([dataset.token2id("item", str(item)) for item in items]) for items in sequences]
    found = []
    for start in range(0, len(ids), 256):
        known = [items[:target] for items in ids[start : start + 256]]
        batch = torch.zeros(len(known), length, dtype=torch.long)
        for row, items in zip(batch, known, strict=True):
            newest = items[-length:]
            row[: len(newest)] = torch.from_numpy(newest)
        lengths = (batch != 0).sum(1)
        scores = model.full_sort_predict(Interaction({model.ITEM_SEQ: batch, model.ITEM_SEQ_LEN: lengths})).numpy()
        for row, items, of_user in zip(scores, known, ids[start : start + 256], strict=True):
            wanted = row[of_user[target]]
            row[[0, *items]] = -np.inf
            found.append(int((row >= wanted).sum()) - 1)
    return found


def main(mode: str, folder: Path, model_name: str, settings: dict) -> None:
    sequences = json.loads((folder / "sequences.json").read_text())
    write_interactions(sequences, folder)
    places = {"data_path": str(folder), "checkpoint_dir": str(folder / "saved")}
    config = Config(model=model_name, dataset="data", config_dict=FIXED | places | settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    result = {"batches": len(train), "parameters": sum(p.numel() for p in model.parameters())}
    if mode == "time":
        seconds, model = [], model.train()
        for step, batch in enumerate(train):
            began = time.perf_counter()
            trainer.optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            trainer.optimizer.step()
            seconds.append(time.perf_counter() - began)
            if step == settings["steps"]:
                break
        result["seconds"] = seconds[1:]
    else:
        trainer.fit(train, valid, verbose=True)
        best = torch.load(trainer.saved_model_file, weights_only=False)
        model.load_state_dict(best["state_dict"])
        length = config["MAX_ITEM_LIST_LENGTH"]
        for name, target in (("valid", -2), ("test", -1)):
            result[name] = ranks(model.eval(), dataset, sequences, length, target)
        result["epochs"] = best["epoch"] + 1
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
