"""Sends each secret only to the server that it belongs to and that the user names."""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit


# what looks like a secret, in text or bytes that are to be shown, written or sent
SECRET = re.compile(
    rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}|\bsk-[\w-]{32,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{40,}"
    rb"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bglpat-[\w-]{20,}|\bxox[abposr]-[\w-]{10,}|\bnpm_[A-Za-z0-9]{36}"
    rb"|\bpypi-[\w-]{50,}|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
)
# variables that hold a service's secret, by how they begin, or what a secret itself begins with; and its servers
SERVICES = (
    (r"HF_|HUGGING_?FACE", r"hf_|api_org_", ("huggingface.co", "hf.co", "huggingface.cloud")),
    (r"AWS_", r"AKIA|ASIA", ("amazonaws.com",)),
    (r"GITHUB_|GH_", r"gh[pousr]_|github_pat_", ("github.com", "githubcopilot.com", "models.github.ai")),
    (r"GITLAB_|CI_", r"glpat-", ("gitlab.com",)),
    (r"OPENAI_", r"sk-proj-", ("openai.com",)),
    (r"AZURE_", None, ("azure.com", "microsoft.com")),
    (r"ANTHROPIC_|CLAUDE_", r"sk-ant-", ("anthropic.com",)),
    (r"GOOGLE_|GEMINI_|GCP_|GCLOUD_", r"AIza", ("googleapis.com", "google.com")),
    (r"MISTRAL_", None, ("mistral.ai",)),
    (r"DEEPSEEK_", None, ("deepseek.com",)),
    (r"GROQ_", r"gsk_", ("groq.com",)),
    (r"TOGETHER_", None, ("together.ai", "together.xyz")),
    (r"OPENROUTER_", r"sk-or-", ("openrouter.ai",)),
    (r"(?:WANDB|SLACK|DOCKER|NPM|PYPI|TWINE|SSH|DATABASE|PG|MYSQL)_|(?:PATH|HOME|USER|PWD)$", r"xox[abposr]-", ()),
)
_SECRET_FIELD = re.compile(
    r"(?:^|[_-])(?:(?:api|access|auth|private|secret)[_-]?(?:key|token)s?|token|secret|key|password|passwd|pwd|"
    r"credentials?|authorization|bearer|cookie)$",
    re.IGNORECASE,
)
# of OpenAI's client, which sends them to whatever server it is given
_OPENAI = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_ADMIN_KEY")


def check_address(url: str) -> str:
    """The address of a server, if it is one and holds no password.

    Raises:
        ValueError: If not, without repeating what may be a secret.
    """
    try:
        parts = urlsplit(url)
        host, given = parts.hostname, parts.username or parts.password
        _ = parts.port
    except ValueError as error:
        raise ValueError(
            f"A server has an address such as http://localhost:8000/v1, but got none: {error}."
        ) from error
    if given or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"A server's address is shown and written down, so it holds no password, no key and no query, but that of "
            f"{host!r} does. Take it out; a key is read from an environment variable that you name."
        )
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x20\x7f\\]", url):
        raise ValueError(f"A server has an address such as http://localhost:8000/v1, but got {url!r:.100}.")
    return url


def check_no_secrets(fields: Mapping, what: str) -> Mapping:
    """Fields of a request, if none of them is a secret: they are written down with what came of them.

    Raises:
        ValueError: Naming the field, not what is in it.
    """
    for path, value in leaves(fields):
        if _SECRET_FIELD.search(path[-1]) or (isinstance(value, str) and SECRET.search(value.encode())):
            raise ValueError(
                f"{what} are written into reports, so they hold no secret, but {'.'.join(path)!r} looks like one. Take "
                f"it out; a key is read from an environment variable that you name."
            )
    return fields


def leaves(value, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yields whatever is in nested mappings and lists, with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from leaves(inside, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for inside in value:
            yield from leaves(inside, path)
    elif path:
        yield path, value


def api_key(url: str, variable: str | None, advice: str) -> str:
    """The API key for a server; "none", which is no one's, if there is no variable.

    Args:
        url: Of the server.
        variable: The environment variable that holds it.
        advice: How to name another variable.

    Raises:
        ValueError: If the variable is not set or holds no key, if what it holds belongs to another service, or if it
            would be sent unencrypted over a network.
    """
    check_address(url)
    if variable is None:
        # not the client's default: no other server may see OpenAI's key
        return "none"
    key = os.environ.get(variable)
    if not key:
        raise ValueError(
            f"The API key for {url} is read from the environment, so that no file holds it, but {variable} is not set. "
            f"Run `export {variable}=...`, or {advice}."
        )
    host = urlsplit(url).hostname
    for names, values, hosts in SERVICES:
        if re.match(names, variable, re.IGNORECASE) or (values and re.match(values, key)):
            if not any(host == known or host.endswith(f".{known}") for known in hosts):
                theirs = f"{' and '.join(hosts)} alone" if hosts else "no model's server"
                raise ValueError(
                    f"A secret is sent to the service that it belongs to, but {variable} is for {theirs}, and the "
                    f"server is {url}. Put this server's own key into a variable of its own, and {advice}."
                )
            break
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"An API key is printable ASCII without spaces, but what {variable} holds is not. Set it again."
        )
    if urlsplit(url).scheme == "http" and not is_loopback(host):
        raise ValueError(
            f"A key is sent encrypted, or to this machine, but {url} is neither: all between could read {variable}. Use "
            f"https://, or a tunnel to a port of localhost."
        )
    return key


def is_loopback(host: str) -> bool:
    """Tells whether a host's name or address stands for this machine."""
    address = address_of(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the address that a host is given by; None if that is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def described(url: str, variable: str | None) -> str:
    """Describes what is sent where, to be shown before it is sent."""
    return f"{url} with {'no key' if variable is None else f'the key in {variable}'}"


def without_key(text: str, key: str) -> str:
    """A server's words without the key, which it may have sent back."""
    return text if key == "none" else text.replace(key, "(the key)")


@contextmanager
def hidden_from(url: str) -> Iterator[None]:
    """While it is open, variables that OpenAI's client would send to a server of somebody else's are not there."""
    hidden = () if urlsplit(url).hostname == "api.openai.com" else _OPENAI
    kept = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
