"""Scores by which SentencePiece's way of joining characters does what a list of merges does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import pairwise

from ptql.errors import InputError

Pair = tuple[str, str]


def spm_scores(vocab: Mapping[str, int], merges: Sequence[Pair], whole: Set[str]) -> dict[str, float]:
    """A score for each token that merges make: the higher, the earlier it is made.

    Merges say which pairs are joined, and in which order. llama.cpp joins any neighbours that make a token, those with
    the highest score first. Both do the same if each token comes from one last pair, that which its own text gives (no
    other pair of its parts ever stands side by side then), and is scored by that pair's place in the list; or if all
    pairs that make it are in the list.

    Args:
        vocab: Ids of the tokens.
        merges: Pairs, the first one first.
        whole: Tokens that are found in the text before all that.

    Raises:
        InputError: A token for which neither holds.
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    scores = {}
    for token in vocab:
        if len(token) < 2 or token in whole or (token.startswith("<0x") and len(token) == 6):
            continue
        splits = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
        last = _last_pair(token, ranks)
        listed = [ranks[pair] for pair in splits if pair in ranks]
        if last is not None:
            scores[token] = -float(ranks[last])
        elif len(listed) == len(splits):
            scores[token] = -float(min(listed, default=len(merges)))
        else:
            raise InputError(
                f"tokenizer: no merges lead to the token {token!r}, which llama.cpp would make all the same; "
                "use --format dense, and llama.cpp's own converter"
            )
    return scores


def _last_pair(token: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The pair that is joined last when merges make `token` of its characters; None if they do not."""
    parts = list(token)
    while len(parts) > 2:
        rank, at = min((ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return None
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    pair = (parts[0], parts[1])
    return pair if pair in ranks else None
