"""Seeds of samples: the same after a restart, and no two alike."""

from __future__ import annotations

from itertools import product

from dpo_ray.reference.sampling import prompt_key, prompt_table, sample_seed


def seeds(seed: int, number: int) -> list[list[int]]:
    return prompt_table([[1, 2], [3]], seed, number, samples=2)["seeds"].to_pylist()


def test_seeds_are_the_same_after_a_restart() -> None:
    assert seeds(7, 1) == seeds(7, 1)
    assert prompt_table([[3], [1, 2]], 7, 1, samples=3)["seeds"].to_pylist()[1][:2] == seeds(7, 1)[0]


def test_runs_rounds_prompts_and_samples_have_seeds_of_their_own() -> None:
    drawn = [
        s for seed, number in product((0, 1, 11), (0, 1, 2)) for of_prompt in seeds(seed, number) for s in of_prompt
    ]
    assert len({*drawn}) == len(drawn) == 3 * 3 * 2 * 2
    assert all(0 <= s < 1 << 63 for s in drawn)  # vLLM takes signed 64-bit seeds
    assert sample_seed(1, 11, b"k", 0) != sample_seed(11, 1, b"k", 0) != sample_seed(1, 1, b"k", 10)


def test_prompts_are_told_apart_by_their_tokens() -> None:
    keys = {prompt_key(ids) for ids in ([1], [1, 1], [256], [1, 0], [0, 1])}
    assert len(keys) == 5
    assert {len(key) for key in keys} == {16}
