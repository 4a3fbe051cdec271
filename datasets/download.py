"""Fetches Amazon Review Data 2018 from the mirrors that serve it."""

import argparse
import http.client
import os
import urllib.error
import urllib.request
from gzip import BadGzipFile
from pathlib import Path

from isal import igzip, isal_zlib
from sources import BLOCK
from tqdm import tqdm

from utils.errors import UserError
from utils.files import is_plain_name

HOME_PAGE = "https://nijianmo.github.io/amazon/index.html"
MIRRORS = (
    "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2",
    "https://jmcauley.ucsd.edu/data/amazon_v2",
)


def fetch(url: str, target: Path, timeout: float) -> None:
    """Fetch `url`, going on where an earlier transfer broke off; raises OSError when it breaks off again."""
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is the whole, or longer than what is there now
            part.unlink()
            raise OSError("the partial file did not fit; it is fetched anew") from error
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("a web page came instead of the file")
        resumed = answer.status == 206
        total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total or None, initial=have if resumed else 0, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := answer.read1(2**20):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise OSError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
    try:
        check_whole(part)
    except OSError:
        part.unlink()
        raise
    os.replace(part, target)


def check_whole(path: Path) -> None:
    """OSError where a file is no gzip file, or is cut off."""
    try:
        with igzip.open(path, "rb") as file:
            while file.read(BLOCK):
                pass
    except (EOFError, BadGzipFile, isal_zlib.error) as error:
        raise OSError(f"{path} is no whole gzip file ({error})") from error


def download(args: argparse.Namespace) -> None:
    """The 2018 5-core reviews and the metadata of a category, from the first mirror that serves them whole."""
    if not is_plain_name(args.category):
        raise UserError(f"--category {args.category!r}: a name as in Clothing_Shoes_and_Jewelry is expected")
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = {
        f"{args.category}_5.json.gz": f"categoryFilesSmall/{args.category}_5.json.gz",
        f"meta_{args.category}.json.gz": f"metaFiles2/meta_{args.category}.json.gz",
    }
    for name, path in wanted.items():
        target = args.output / name
        failures = []
        if target.exists():
            try:
                check_whole(target)
            except OSError as error:
                raise UserError(f"{error}; remove it, it is fetched again") from error
        for mirror in [] if target.exists() else (args.mirror or MIRRORS):
            for _ in range(args.tries):
                try:
                    fetch(f"{mirror.rstrip('/')}/{path}", target, args.timeout)
                    break
                except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
                    failures.append(f"{mirror}: {error}")
            if target.exists():
                break
        if not target.exists():
            raise UserError(
                f"{name} could not be fetched ({failures[-1]}); try again, a broken transfer goes on where it stopped; "
                f"pass --mirror URL, or fetch it by hand from {HOME_PAGE}"
            )
        print(f"{target}: {target.stat().st_size:,} bytes, whole")
