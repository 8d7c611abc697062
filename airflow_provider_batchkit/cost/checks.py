"""What the API says for free before anything is sent: the tokens of a sample, and what each model takes.

A batch accepts params that it then refuses request by request, up to a day later. Here a definite refusal stops a job before its first
POST. A check that fails for any other reason (429, 5xx, no network, a key or a gateway without that call) changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.request.exposure import Exposure, params_of
from airflow_provider_batchkit.request.shards import Sample, Shard

log = logging.getLogger(__name__)

#: the most requests of a job whose tokens the API counts, the most models that are looked up, and the most calls for both
_SAMPLES, _MODELS, _CALLS = 10, 6, 12
#: bytes of a text for each prompt token, where no tokens were counted
_BYTES_PER_TOKEN = 4
#: the members of a request's params that the token count takes
_COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control")


class FreeCalls(Protocol):
    """The calls that cost nothing; see :class:`~airflow_provider_batchkit.api.BatchApi`."""

    @property
    def sends_betas(self) -> bool:
        """Whether the API may take more than its information on a model says."""

    def count_tokens(self, params: Mapping[str, Any]) -> int:
        """:raises RequestError: when the API refuses the message for good"""

    def model_info(self, model: str) -> Mapping[str, Any]:
        """The API's information on a model."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Prompt tokens of a sample of requests."""

    #: model → tokens of its sampled requests, and the bytes that these tokens were counted in
    per_model: Mapping[str, tuple[int, int]]
    #: the source of the figures
    source: str

    def rate(self, model: str) -> tuple[int, int]:
        """The ratio of tokens to bytes for requests to a model, as a pair (tokens, bytes)."""
        known = self.per_model.get(model)
        if known is not None:
            return known
        if not self.per_model:
            return 1, _BYTES_PER_TOKEN
        return sum(tokens for tokens, _ in self.per_model.values()), sum(size for _, size in self.per_model.values())


NOT_COUNTED = Counted({}, f"a token for {_BYTES_PER_TOKEN} bytes")


def exposure_of(shards: Sequence[Shard]) -> Exposure:
    """What all the shards together may cost."""
    total = Exposure()
    for shard in shards:
        total.include(shard.exposure)
    return total


def check_shards(api: FreeCalls, shards: Sequence[Shard], samples: Callable[[int], Iterable[Sample]]) -> Counted:
    """Have the API look at a sample of the requests and at their models, in 12 calls at most, and count the sample's tokens.

    :param samples: returns as many of the shards' requests as its argument says
    :raises RequestError: the API would refuse a request or a model; the error has its words and the key of a row; nothing was sent
    """
    return check(api, exposure_of(shards), samples)


def check(api: FreeCalls, exposure: Exposure, samples: Callable[[int], Iterable[Sample]]) -> Counted:
    """The same as :func:`check_shards`, for requests of this exposure."""
    models = sorted(exposure.most_output)[:_MODELS]
    infos: dict[str, Mapping[str, Any]] = {}
    calls = 0
    for model in models:
        max_tokens, key = exposure.most_output[model]
        calls += 1
        try:
            infos[model] = info = api.model_info(model)
        except Exception as e:  # noqa: BLE001 - a failed check is a line in the log, never a failed task
            log.info("The limits of %s could not be looked up (%s: %s); they are not checked.", model, type(e).__name__, e)
            if len(models) > 1:
                # the sample may have no request to this model; with a single model, every request is to it
                calls += 1
                _count(api, [Sample(key, _asking(model))])
            break
        _check_model(model, info, max_tokens, key, betas=api.sends_betas)
    return _count(api, samples(min(_SAMPLES, _CALLS - calls)), infos)


def _check_model(model: str, info: Mapping[str, Any], max_tokens: int, key: str, *, betas: bool) -> None:
    """Check the requests to a model against the API's information on it. What that omits, or says in another form, is not checked."""
    if info.get("lifecycle") == "retired":
        raise RequestError(f"key {key}: the model {model} is retired and answers no more. Give another one. Nothing was sent.")
    if info.get("lifecycle") == "deprecated":
        retires_at = info.get("retires_at")
        log.warning("The model %s is deprecated and will be retired%s.", model, f" on {str(retires_at)[:10]}" if retires_at else "")
    match info.get("capabilities"):
        case {"batch": {"supported": False}}:
            raise RequestError(f"key {key}: the model {model} does not take message batches. Give another one. Nothing was sent.")
    limit = info.get("max_tokens")
    if isinstance(limit, int) and 0 < limit < max_tokens:
        problem = f"key {key}: max_tokens is {max_tokens:,}, and {model} writes {limit:,} at most"
        if not betas:
            raise RequestError(f"{problem}. Nothing was sent.")
        log.warning("%s, unless the anthropic-beta header of the connection allows more.", problem)


def _asking(model: str) -> bytes:
    """A request to a model, as it would be uploaded, which the API can refuse only for the model's name."""
    params = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}
    return json.dumps({"custom_id": "check", "params": params}).encode()


def _check_thinking(params: Mapping[str, Any], info: Mapping[str, Any], key: str, *, betas: bool) -> None:
    """Check a request's thinking against the API's information on its model. The SDK documents a 400 for a type that is not supported."""
    match params.get("thinking"), info.get("capabilities"):
        case {"type": str(kind)}, {"thinking": {"types": Mapping() as types}}:
            match types.get(kind):
                case {"supported": False}:
                    taken = [name for name, told in types.items() if isinstance(told, Mapping) and told.get("supported")]
                    problem = f"key {key}: {params['model']} does not take thinking of type {kind!r}; it takes {', '.join(taken) or 'none'}"
                    if not betas:
                        raise RequestError(f"{problem}. Nothing was sent.")
                    log.warning("%s, unless the anthropic-beta header of the connection allows it.", problem)


def _count(api: FreeCalls, samples: Iterable[Sample], infos: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Counted:
    counts: dict[str, tuple[int, int]] = {}
    counted = 0
    for key, body in samples:
        params = params_of(body)
        _check_thinking(params, infos.get(params["model"], {}), key, betas=api.sends_betas)
        try:
            tokens = api.count_tokens({name: params[name] for name in _COUNTED if name in params})
        except RequestError as e:
            raise RequestError(f"key {key}: {str(e).rstrip('.')}. Nothing was sent.") from e
        except Exception as e:  # noqa: BLE001 - an estimate is worth a warning, never a failed task
            log.warning(
                "The tokens of a sample could not be counted (%s: %s); taking a token for %d bytes.", type(e).__name__, e, _BYTES_PER_TOKEN
            )
            return NOT_COUNTED
        known_tokens, known_size = counts.get(params["model"], (0, 0))
        counts[params["model"]] = known_tokens + tokens, known_size + len(body)
        counted += 1
    return Counted(counts, f"counted on {counted} of them") if counted else NOT_COUNTED
