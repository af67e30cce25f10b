"""Which tokenizer belongs to a data set or a model, where nobody said."""

from __future__ import annotations

from collections.abc import Mapping

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import places
from mesh_transformer.data.companions import companions_of
from mesh_transformer.data.record import DataRecord, data_record
from mesh_transformer.data.tokenizer import Tokenizer, from_bytes, load_tokenizer


def tokenizer_for_data(
    spec: str | None, data: str | Mapping[str, str], n_vocab: int, otherwise: Tokenizer | None = None
) -> Tokenizer | None:
    """The tokenizer that `spec` names; else the one that the data's own record names; else `otherwise`; else
    `default_tokenizer`.

    Args:
        data: where the data is, or where each set of a mixture is.
        otherwise: that of the model which is trained on the data.

    Raises:
        DataError: it cannot be loaded, is not the one that the data was made with, or has more ids than the model; or
            the sets of a mixture were made with different ones.
    """
    where, record = _record(data)
    named = spec or (record.tokenizer if record else None)
    tokenizer = _load(named) if named else otherwise or default_tokenizer(n_vocab)
    if tokenizer is None:
        return None
    if record and tokenizer.sha256 != record.tokenizer_sha256:
        raise DataError(
            f"data.tokenizer = {spec!r} is not the tokenizer that made {where} ({record.tokenizer}); "
            "leave data.tokenizer out, or prepare the data again"
        )
    check_fits(tokenizer, n_vocab)
    return tokenizer


def tokenizer_is_said(spec: str | None, data: str | Mapping[str, str]) -> bool:
    """Whether `spec`, or else the data's own record, names a tokenizer.

    Raises:
        DataError: the sets of a mixture were made with different ones.
    """
    return spec is not None or _record(data)[1] is not None


def _record(data: str | Mapping[str, str]) -> tuple[str, DataRecord | None]:
    """The record of the data, of a mixture the first set's that has one, and where that is."""
    if isinstance(data, str):
        return data, data_record(data)
    found = [(where, record) for where in data.values() if (record := data_record(where))]
    for where, record in found[1:]:
        if record.tokenizer_sha256 != found[0][1].tokenizer_sha256:
            raise DataError(
                f"data.train mixes {found[0][0]}, made with the tokenizer {found[0][1].tokenizer}, and {where}, made "
                f"with {record.tokenizer}: their ids mean different texts; prepare one of them again"
            )
    return found[0] if found else ("", None)


def _load(named: str) -> Tokenizer:
    if not places.is_url(places.normal(named)):
        return load_tokenizer(places.normal(named))
    content = places.read_file(named)
    if content is None:
        raise DataError(f"tokenizer {named!r} does not exist; expected gpt2, bytes or the place of a tokenizer.json")
    folder = named.rpartition("/")[0]
    companions = companions_of(lambda name: places.read_file(f"{folder}/{name}"), folder)
    return from_bytes(content, name=named, companions=companions)


def default_tokenizer(n_vocab: int) -> Tokenizer | None:
    """gpt2 for a vocabulary that holds it, else bytes, else None: text cannot then be read, token ids can."""
    if n_vocab >= 50257:
        return load_tokenizer("gpt2")
    return load_tokenizer("bytes") if n_vocab >= 257 else None


def check_fits(tokenizer: Tokenizer, n_vocab: int) -> None:
    """Raises DataError if the tokenizer has ids that the model has not."""
    if tokenizer.n_vocab > n_vocab:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids but model.n_vocab is {n_vocab}; "
            "use a model with at least as many, or another tokenizer"
        )
