"""Vectors of texts: of a sentence encoder, or the mean of a language model's own states."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from models.llm.decoder import base_config, fingerprint, load_decoder, pretrained_arguments, quiet_transformers
from utils import assets
from utils.errors import UserError, first_line

MAX_TOKENS = 256  # what all-MiniLM-L6-v2 reads
BATCH = 64


def load_encoder() -> tuple[str, nn.Module]:
    """The folder of the embedded sentence encoder, and the model."""
    folder = str(assets.encoder_path())
    try:
        with quiet_transformers():
            return folder, AutoModel.from_pretrained(
                **pretrained_arguments(folder), dtype=torch.float32, use_safetensors=True
            )
    except Exception as error:  # any library's error
        raise UserError(f"{folder} cannot be read ({first_line(error)}); remove it, it is fetched again") from error


def load_language_model(text_model: str) -> tuple[str, nn.Module]:
    """Where a language model is, as assets.base_model_path says it, and its decoder with all layers."""
    try:
        base = assets.base_model_path(text_model)
        return base, load_decoder(base, base_config(base).num_hidden_layers, "first", torch.float32)
    except UserError as error:
        raise UserError(str(error).replace("--base_model", "--text_model")) from error


def tokens(name: str, folder: str, model: nn.Module, texts: list[str]) -> list[dict]:
    """Of each text its input_ids and special_tokens_mask, cut to what is read, and whether it is cut."""
    longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(**pretrained_arguments(folder))
            whole = tokenizer(texts).input_ids
            found = tokenizer(texts, truncation=True, max_length=longest, return_special_tokens_mask=True)
    except Exception as error:  # tokenizers raise what they like
        raise UserError(f"--text_model {name}: its tokenizer cannot be read ({first_line(error)})") from error
    largest = max(max(ids, default=0) for ids in found.input_ids)
    if largest >= len(model.get_input_embeddings().weight):
        raise UserError(f"--text_model {name}: its tokenizer makes token {largest}, which its embedding lacks")
    known = [token != tokenizer.unk_token_id for ids in found.input_ids for token in ids]
    if sum(known) < len(known) / 2:  # which transformers makes without a word where its files are missing
        raise UserError(f"--text_model {name}: its tokenizer does not know most of the words; choose another")
    names = ("input_ids", "special_tokens_mask")
    rows = [{name: torch.tensor(found[name][at], dtype=torch.long) for name in names} for at in range(len(texts))]
    return [row | {"cut": len(ids) > longest} for row, ids in zip(rows, whole, strict=True)]


def mean_states(model: nn.Module, rows: list[dict], with_special: bool) -> torch.Tensor:
    """(B, D): the mean of the last layer's states over the tokens of each row of `tokens`."""
    ids, special = (
        pad_sequence([row[n] for row in rows], batch_first=True) for n in ("input_ids", "special_tokens_mask")
    )
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    there = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T), padded at the right
    device = model.get_input_embeddings().weight.device
    states = model(input_ids=ids.to(device), attention_mask=there.long().to(device)).last_hidden_state  # (B, T, D)
    counted = (there if with_special else there & (special == 0))[..., None].to(device)
    return (states.float() * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


class TextModel:
    """What reads texts: the embedded sentence encoder, or a language model as --base_model takes it.

    name: as configurations hold it. width: D of its vectors. fingerprint: SHA-256 of its weights.
    """

    def __init__(self, text_model: str) -> None:
        # the encoder was trained with its special tokens in the mean; a language model's start token gathers attention
        # and says nothing of a text
        self.with_special = text_model == assets.EMBEDDED_ENCODER
        self.folder, self.model = load_encoder() if self.with_special else load_language_model(text_model)
        self.model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()
        self.name = assets.record_base_model(text_model, self.folder)
        self.width, self.fingerprint = self.model.config.hidden_size, fingerprint(self.model, {})

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """(N, D), rows of length 1, or of zeros for a text without tokens; and how many texts were too long and cut.

        Equal texts have equal vectors, whatever they are computed beside.
        """
        at = {text: number for number, text in enumerate(sorted(set(texts)))}
        rows = tokens(self.name, self.folder, self.model, list(at))
        lengths = [len(row["input_ids"]) for row in rows]
        order = sorted(filter(lengths.__getitem__, range(len(rows))), key=lengths.__getitem__, reverse=True)
        vectors = torch.zeros(len(rows), self.width)
        with tqdm(total=len(order), desc="texts", unit="text", mininterval=1) as bar:
            for low in range(0, len(order), BATCH):
                batch = order[low : low + BATCH]
                states = mean_states(self.model, [rows[number] for number in batch], self.with_special)
                vectors[batch] = F.normalize(states, dim=1).cpu()
                bar.update(len(batch))
        if not torch.isfinite(vectors).all():
            raise UserError(f"--text_model {self.name}: its states hold NaN or infinity; choose another")
        return vectors[[at[text] for text in texts]], sum(rows[at[text]]["cut"] for text in texts)
