"""Traditional recommenders by the name that --model takes: the only list of them."""

from models.sr.sasrec import SASRec

MODELS = {"sasrec": SASRec}
