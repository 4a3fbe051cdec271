"""Traditional recommenders by the name that --model takes: the only list of them."""

from models.sr.sasrec import SASRec
from models.sr.sasrec_released import SASRecReleased

MODELS = {"sasrec": SASRec, "sasrec_released": SASRecReleased}
