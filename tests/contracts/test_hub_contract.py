"""What this project relies on of huggingface_hub's private parts."""

import hashlib
import io

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils.sha import sha_fileobj


def test_the_hub_reads_the_sha_256_of_an_open_file():
    content = b"weights" * 1000
    assert sha_fileobj(io.BytesIO(content)).hex() == hashlib.sha256(content).hexdigest()


def test_the_second_group_of_the_hub_s_pattern_is_the_metadata_of_a_card():
    assert REGEX_YAML_BLOCK.search("---\nlicense: mit\n---\n# Name\n")[2] == "license: mit"
    assert REGEX_YAML_BLOCK.search("---\nlicense: [\n---\n")[2] == "license: ["
    assert REGEX_YAML_BLOCK.search("# Name\n") is None
