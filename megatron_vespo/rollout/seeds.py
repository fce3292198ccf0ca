"""A seed for each sample of a run."""

import hashlib


def sample_seed(run_seed: int, stream: str, identity: str, sample: int) -> int:
    """A seed for one sample, 0 <= seed < 2^63: the noise of SGLang's sampler depends only on it, position and token.

    The first 8 bytes, big endian, without the highest bit, of BLAKE2b over the four values, each as text behind its
    length. The same on every machine and in every version of Python.
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in (run_seed, stream, identity, sample):
        text = str(value).encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest(), "big") & (2**63 - 1)
