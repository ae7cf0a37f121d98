"""The protocol of a run that was made, as run.json holds it: known by its hash."""

from __future__ import annotations

from pydantic import ValidationError

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol
from kvpatch.store.record import RunRecord, dumped_sha256


def stored_protocol(record: RunRecord, *, is_exploratory: bool = False) -> Protocol:
    """The protocol a run was made with.

    is_exploratory: also take one that was changed after the run; no claim of it is then confirmatory.

    Raises:
        ProtocolError: where what run.json holds no longer has the hash that was stored before the first trial, or is no
            protocol.
    """
    found = dumped_sha256(record.protocol)
    if found != record.protocol_sha256 and not is_exploratory:
        raise ProtocolError(
            f"the protocol in run.json has hash {found[:12]}, and the run was made with "
            f"{record.protocol_sha256[:12]}: it was changed after the run, so its verdicts would not be confirmatory; "
            "--exploratory marks them so"
        )
    try:
        protocol = Protocol.as_stored(record.protocol)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or "protocol"
        raise ProtocolError(f"the protocol in run.json is none: {where}: {first['msg']}") from error
    return as_exploratory(protocol) if is_exploratory else protocol


def as_exploratory(protocol: Protocol) -> Protocol:
    """The protocol with no confirmatory hypothesis."""
    marked = [h.model_copy(update={"confirmatory": False}) for h in protocol.hypotheses]
    return protocol.model_copy(update={"hypotheses": marked})
