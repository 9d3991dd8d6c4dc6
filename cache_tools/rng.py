"""Counter-based random numbers: each draw is a hash of (seed, purpose, counters), without state."""

import hashlib

import numpy as np
import numpy.typing as npt

Counter = int | npt.NDArray[np.integer]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)  # in place: allocation takes as long as the arithmetic
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_u64(seed: int, purpose: str, *counters: Counter) -> npt.NDArray[np.uint64]:
    """Return 64 hashed bits for each element of the broadcast `counters`."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    state = np.array(int.from_bytes(digest[:8], "little"), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            bits = np.asarray(counter).astype(np.uint64)
            state = _mix(state + _GAMMA + _mix(bits * _GAMMA + _GAMMA))
        return _mix(state + _GAMMA)


def uniform(seed: int, purpose: str, *counters: Counter) -> npt.NDArray[np.float64]:
    """Return uniform draws from [0, 1) with 53 bits."""
    return (hash_u64(seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, purpose: str, *counters: Counter) -> npt.NDArray[np.float32]:
    """Return draws from the standard normal distribution, by the Box-Muller transform."""
    u, v = (uniform(seed, f"{purpose}/{part}", *counters) for part in (0, 1))
    draws: npt.NDArray[np.float64] = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
    return draws.astype(np.float32)


def permutation(n: int, seed: int, purpose: str, *counters: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(n), int64 [n]: the argsort of n hashed numbers."""
    hashes = hash_u64(seed, purpose, *counters, np.arange(n))
    return np.argsort(hashes, kind="stable").astype(np.int64)
