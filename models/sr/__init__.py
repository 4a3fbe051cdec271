"""Traditional recommenders by the name that --model takes."""

from models.sr.sasrec import SASRec

MODELS = {"sasrec": SASRec}
