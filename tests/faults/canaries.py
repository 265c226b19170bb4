"""Secrets that mean nothing, put where real ones are, and the search for them afterwards."""

import base64
import hashlib

VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
SECRETS = {name: hashlib.sha1(name.encode()).hexdigest() for name in (*VARIABLES, "netrc")}
"""Forty characters each: what W&B takes for a key."""


def plant(home):
    """The environment with the secrets in it; the one of netrc is in a file in `home`."""
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {SECRETS['netrc']}\n")
    netrc.chmod(0o600)
    return {"HOME": str(home), **{name: SECRETS[name] for name in VARIABLES}}


def forms(secret):
    """A secret as bytes, and as base64 encodes it behind 0, 1 or 2 other bytes."""
    shifted = (base64.b64encode(b"x" * n + secret.encode()) for n in range(3))
    return [secret.encode(), *(code[4 * (n > 0) : -4] for n, code in enumerate(shifted))]


def find(folder, *texts):
    """Where any of the secrets is: files below a folder, by name, and texts, by number."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places = files | {f"text {n}": text.encode() for n, text in enumerate(texts)}
    known = [form for secret in SECRETS.values() for form in forms(secret)]
    return [place for place, data in places.items() if any(form in data for form in known)]
