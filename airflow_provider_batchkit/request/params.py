"""Checks of a request's params without a call of the API. A real batch accepts bad params, and fails the request up to a day later.

The names are those of the SDK's own types: a name that :class:`anthropic.types.MessageCreateParams` does not list is far more often
misspelt than new. :class:`ParamNames` lets further names through.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.request.caching import marker_problem
from airflow_provider_batchkit.request.system import system_problem

#: names that the API takes although the SDK's types do not list them: sampling parameters of older models
_OLDER = frozenset({"temperature", "top_p", "top_k"})
#: the same for the beta API
_OLDER_BETA = _OLDER | {"output_format"}
#: arguments of the SDK's own calls that are not parameters of the API → where they belong in a batch
_NOT_PARAMS = {
    "extra_body": "is an argument of the SDK's own calls: put the parameters that it holds into params themselves",
    "extra_headers": "is an argument of the SDK's own calls: headers belong to the connection (anthropic_client_kwargs, default_headers)",
    "extra_query": "is an argument of the SDK's own calls, and a batch has no use for it",
    "timeout": "is an argument of the SDK's own calls, and a batch has no use for it",
    "betas": "is sent as the header anthropic-beta: it belongs to the connection (anthropic_client_kwargs, default_headers)",
    "workspace_id": "is sent as a header: it belongs to the connection (anthropic_client_kwargs, default_headers)",
    "custom_id": "stands beside params in a native request, not in them",
}
#: only the API checks these: their blocks are many and large, and new kinds come often
_OPEN = frozenset({"messages"})
#: number of valid params that are remembered
_SETS = 1_000
_ENCODE = msgspec.json.Encoder()

_MODEL = re.compile(r"(?P<vendor>(?:.*[/:.])?)(?P<name>claude-[\w.-]+?)(?:-v\d+)?(?P<version>(?:@\w+)?(?::\w+)?)")


def model_problem(model: str) -> str | None:
    """Why a model's name is not one of this API, where it is another vendor's name for a Claude model; None for any other name.

    Bedrock, Vertex and routers have names of their own: ``us.anthropic.claude-…-v1:0``, ``claude-…@20251001``, ``anthropic/claude-…``.
    """
    found = _MODEL.fullmatch(model.strip())
    if found is None or not (found["vendor"] or found["version"]):
        return None
    date = re.match(r"@(\d+)", found["version"])
    # routers write claude-sonnet-4.6 for claude-sonnet-4-6
    own = found["name"].replace(".", "-") + (f"-{date[1]}" if date else "")
    return f"the model {model!r} has another vendor's name; the Messages API calls it {own!r}"


class ParamNames:
    """The names that params may have."""

    def __init__(self, allowed: bool | Collection[str] = False, *, beta: bool = False) -> None:
        """
        :param allowed: names that are newer than the installed SDK, a nested one with its path (``output_config.verbosity``). True allows
            every name, and models of any name
        :param beta: whether requests go to the beta API, which takes more names
        :raises BatchInputError: for anything else
        """
        if isinstance(allowed, str | bytes | Mapping) or not isinstance(allowed, bool | Collection):
            raise BatchInputError(f"allow_unknown_params must be True, or a list of names, not {allowed!r}.")
        #: whether names that this package does not know are let through
        self.takes_all = allowed is True
        self._allowed = frozenset() if isinstance(allowed, bool) else frozenset(map(str, allowed))
        self._beta = beta
        #: valid params, without their messages and texts
        self._good: set[tuple[tuple[str, ...], bytes]] = set()

    def problem(self, params: Mapping[str, Any]) -> str | None:
        """What is wrong with the names in params, and with the names of models; None when nothing is."""
        if self.takes_all:
            return None
        try:
            seen = tuple(params), _ENCODE.encode([of for name, of in params.items() if _has_names(name, of)])
        except TypeError:
            seen = None  # such params cannot be sent either, but their names are checked first
        if seen in self._good:
            return None
        hints = _hints(beta=self._beta)
        found = self._first(params, [hints], "")
        for name in () if found else filter(lambda name: _has_names(name, params[name]), params):
            found = found or self._below(params[name], hints.get(name), name)
        if seen is not None and found is None and len(self._good) < _SETS:
            self._good.add(seen)
        return found

    def _first(self, value: Mapping[str, Any], kinds: Sequence[Mapping[str, Any]], path: str) -> str | None:
        """The problem with the first name that none of ``kinds`` has; None when each name is known."""
        known = set().union(*kinds) if path else set(kinds[0]) - _NOT_PARAMS.keys()
        for name in value:
            full = re.sub(r"\[\d+\]", "", f"{path}.{name}") if path else str(name)
            if name not in known and full not in self._allowed:
                if not path and name in _NOT_PARAMS:
                    return f"{name!r} in params {_NOT_PARAMS[name]}"
                if not path and name in _hints(beta=True):
                    return f"{name!r} is a parameter of the beta API: {_BETA}"
                return _unknown(full, path or "params", known)
        return None

    def _below(self, value: Any, hint: Any, path: str) -> str | None:
        """The problem with the names in a member of params; None without one."""
        if hint is None or value is None:
            return None
        if isinstance(value, str):
            return model_problem(value) if path == "model" or path.endswith(".model") else None
        if isinstance(value, Mapping):
            kinds = _kinds(hint, value)
            if not kinds:
                return None
            found = self._first(value, kinds, path)
            if found:
                return found
            hints = {name: of for kind in reversed(kinds) for name, of in kind.items()}
            return next(filter(None, (self._below(of, hints.get(name), f"{path}.{name}") for name, of in value.items())), None)
        if isinstance(value, list | tuple):
            element = _element(hint)
            return next(filter(None, (self._below(of, element, f"{path}[{place}]") for place, of in enumerate(value))), None)
        return None


_BETA = "it needs the header anthropic-beta, which belongs to the connection (anthropic_client_kwargs, default_headers)"
_BOOLEANS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}
SDK_NAMES = ParamNames()


def parse_allowed(text: str | None) -> bool | list[str]:
    """A configured ``allow_unknown_params``: a boolean, or names with commas or spaces between."""
    words = (text or "").replace(",", " ").split()
    return _BOOLEANS.get(words[0].lower(), words) if len(words) == 1 else words


def _has_names(name: str, value: Any) -> bool:
    """Whether a member of params holds names that must be checked: those of its own members, or a model's."""
    return name not in _OPEN and (name == "model" or not isinstance(value, str))


def _unknown(full: str, where: str, known: Collection[str]) -> str:
    import anthropic

    name = full.rpartition(".")[2]
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    instead = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(sorted(known))}"
    return (
        f"{where} has {name!r}, which the Messages API does not know; {instead}. That is what the types of anthropic "
        f"{anthropic.__version__} say: if it is newer, add {full!r} to allow_unknown_params ([batchkit] in Airflow's configuration, or the "
        "parameter of BatchKit)"
    )


@cache
def _hints(*, beta: bool) -> dict[str, Any]:
    """The parameters of a request, each with its type."""
    if beta:
        from anthropic.types.beta import message_create_params
    else:
        from anthropic.types import message_create_params  # type: ignore[no-redef]
    return {**dict.fromkeys(_OLDER_BETA if beta else _OLDER), **_members(message_create_params.MessageCreateParamsNonStreaming)}


@cache
def _members(typed_dict: Any) -> dict[str, Any]:
    return get_type_hints(typed_dict)


def _is_typed_dict(hint: Any) -> bool:
    # the SDK's typed dictionaries are those of typing_extensions, which typing.is_typeddict does not know
    return isinstance(hint, type) and hasattr(hint, "__required_keys__")


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _kinds(hint: Any, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members of each typed dictionary that a mapping may be. The list is empty for one of any or of unknown type."""
    found = []
    for one in _alternatives(hint):
        if _is_typed_dict(one):
            members = _members(one)
            tag = members.get("type")
            tags = [name for literal in _alternatives(tag) if get_origin(literal) is Literal for name in get_args(literal)]
            if not tags or "type" not in value or value["type"] in tags:
                found.append(members)
        elif one in (dict, object, Any) or get_origin(one) in (dict, Mapping):
            return []
    return found


def _element(hint: Any) -> Any:
    """The type of a list's elements."""
    elements = [get_args(one)[0] for one in _alternatives(hint) if get_args(one) and get_origin(one) not in (Literal, dict)]
    return Union[tuple(elements)] if elements else None  # noqa: UP007 - the types are known only at run time


def check_params(params: Any, names: ParamNames = SDK_NAMES) -> None:
    """Raise :class:`RequestError` for params that the API would refuse."""
    problem = _problem(params, names)
    if problem:
        raise RequestError(f"{problem}. Nothing was sent.")


def _problem(params: Any, names: ParamNames) -> str | None:
    if not isinstance(params, Mapping):
        return f"params must be a mapping, not {type(params).__name__}"
    # this is checked first, because older SDKs do not list speed for this API
    if params.get("speed") == "fast":
        return "speed 'fast' is not possible in a batch"
    problem = names.problem(params) or _problem_of_messages(params.get("messages"))
    if problem is None and not names.takes_all:
        problem = system_problem(params.get("system")) or marker_problem(params)
    if problem:
        return problem
    max_tokens = params.get("max_tokens")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        return f"max_tokens must be a whole number of at least 1, not {max_tokens!r}"
    model = params.get("model")
    if not isinstance(model, str) or not model.strip():
        return "no model"
    if params.get("stream"):
        return "'stream' is not possible in a batch"
    return None


def _problem_of_messages(messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        return "no messages: params['messages'] must be a non-empty list"
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant"):
            return f"messages[{position}] needs a role, 'user' or 'assistant'"
        content = message.get("content")
        if not content or (isinstance(content, str) and content.isspace()):
            return f"messages[{position}] has no content"
    return None
