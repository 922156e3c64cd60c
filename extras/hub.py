"""Models of a hub: the files of a repository that a conversion reads, by the resumable download of stories.py.

    python extras/convert.py --from hf:roneneldan/TinyStories-33M model.safetensors

All files are those of one commit, and each is checked against the hash that the hub has of it. They stay in a folder
beside OUT, OWNER--REPO, where an interrupted download is resumed. HF_ENDPOINT replaces the address of Hugging Face.
"""

import hashlib
import http.client
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import bpe
from extras import stories

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # OWNER/REPO
LISTING_MOST = 1 << 24  # bytes of the list of files
TENSORS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")  # the first that are there
TOKENIZERS = (r"tokenizer\.json", r"(vocab\.json|merges\.txt)", r"tokenizer\.model")


class HubFile(NamedTuple):
    """A file of a repository, as `stories.fetch` takes it."""

    name: str
    size: int
    expected: str  # digest, in hex
    address: str
    is_blob: bool  # hashed as Git does it: small files; SHA-256 otherwise

    def url(self):
        return self.address

    def digest(self):
        """A hash of no bytes yet."""
        return hashlib.sha1(b"blob %d\0" % self.size) if self.is_blob else hashlib.sha256()


def fetch_model(repo, folder):
    """Download what a conversion reads of OWNER/REPO into a folder. ValueError, in words for the user, if it cannot."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ValueError(f"hf:{repo} is not fetched: HF_HUB_OFFLINE is set")
    try:
        files = list_files(repo)
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = stories.fetch(file, folder, file.size)
            if stories.wrong_digest(file, path):  # it was there
                raise ValueError(f"{path} is not the file that the hub has; remove it")
    except stories.DownloadError as error:
        raise ValueError(f"hf:{repo} is not fetched: {error}") from None
    bpe.note(f"{folder}: {', '.join(file.name for file in files)} of {repo}")


def list_files(repo):
    """The `HubFile`s that a conversion reads. ValueError if the repository lacks one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        with stories.open_url(f"{endpoint}/api/models/{repo}?blobs=true", {}) as response:
            listing = json.loads(response.read(LISTING_MOST))
        commit, entries = str(listing["sha"]), {entry["rfilename"]: entry for entry in listing["siblings"]}
        wanted = choose(entries)
        files = [as_file(entries[name], f"{endpoint}/{repo}/resolve/{commit}/{name}") for name in wanted]
    except (KeyError, TypeError, OSError, json.JSONDecodeError, http.client.HTTPException) as error:
        raise ValueError(f"the hub's list of files is not one ({type(error).__name__})") from None
    return files


def choose(names):
    """The names of config.json, of the tensors and of the tokenizer. ValueError if one of them is missing."""
    found = []
    for what, patterns in (
        ("config.json", (r"config\.json",)),
        ("file of tensors", TENSORS),
        ("tokenizer", TOKENIZERS),
    ):
        matches = [[name for name in sorted(names) if re.fullmatch(pattern, name)] for pattern in patterns]
        if not any(matches):
            expected = " or ".join(pattern.replace("\\", "") for pattern in patterns)
            raise ValueError(f"the repository has no {what}: expected {expected}")
        found += next(filter(None, matches))
    return found


def as_file(entry, address):
    lfs = entry.get("lfs")
    size, digest = (lfs["size"], lfs["sha256"]) if lfs else (entry["size"], entry["blobId"])
    if type(size) is not int or not 0 < size < 2**48 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(digest)):
        raise ValueError(f"the hub's list of files has no size and hash of {Path(entry['rfilename']).name}")
    return HubFile(entry["rfilename"], size, digest, address, not lfs)
