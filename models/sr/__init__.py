"""Traditional recommenders by the name that --model takes: the only list of them."""

from models.sr.bert4rec import BERT4Rec
from models.sr.caser import Caser
from models.sr.duorec import DuoRec
from models.sr.gru4rec import GRU4Rec
from models.sr.hgn import HGN
from models.sr.lightsans import LightSANs
from models.sr.maerec import MAERec
from models.sr.s3rec import S3Rec
from models.sr.sasrec import SASRec
from models.sr.sasrec_original import SASRecOriginal
from models.sr.sasrec_released import SASRecReleased

MODELS = {
    "bert4rec": BERT4Rec,
    "caser": Caser,
    "duorec": DuoRec,
    "gru4rec": GRU4Rec,
    "hgn": HGN,
    "lightsans": LightSANs,
    "maerec": MAERec,
    "s3rec": S3Rec,
    "sasrec": SASRec,
    "sasrec_original": SASRecOriginal,
    "sasrec_released": SASRecReleased,
}
