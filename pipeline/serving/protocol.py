"""What travels over HTTP: OpenAI's completions as strict schemas, and its answers.

Nothing here knows an engine or a server. A field OpenAI does not have is marked as ours.

What a request may cost before it is refused or taken is bounded, because all requests share one event loop:

    to read the body       gate.py: its bytes, and the values in it, before it is parsed (40 ms at most)
    fields of no name      the first one refuses the request
    prompt                 one pass over it that stops at the first fault; 128 prompts at most; texts longer than the
                           context by any count are refused unread, and over 10,000 characters are tokenized in a
                           thread, which stops at the first prompt that does not fit
    logit_bias             1,024 entries, read once for all prompts
    stop, stop_token_ids   16 of 256 characters; 256
    tokens (detokenize)    one pass that stops at the first fault
    model, user            256 characters
    the other fields       a number or a truth value

And what it may cost once it is taken:

    n, best_of, num_beams  16 each; times prompts, no more sequences than run and wait at once (429 or 400)
    max_tokens             the context
    logprobs               20 for each token of the answer, and with echo of the prompt
    time                   serve.deadline_seconds, whatever the work
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from model.sampling import MAX_LOOKUP_TOKENS, SamplingSettings
from pipeline.serving.errors import ApiError

MAX_PROMPTS = 128
TOKEN_LIMIT = 1 << 32  # above every vocabulary: a number that is no token id at all
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]


class Strict(BaseModel):
    """Refuses unknown fields and silent conversions: `"5"` is not 5, a typo is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_fields(cls, given: Any) -> Any:
        """Name the first unknown field; pydantic would describe a hundred thousand of them one by one."""
        unknown = next((name for name in given if name not in cls.model_fields), None) if type(given) is dict else None
        if unknown is not None:
            raise ApiError(400, f"There is no field {str(unknown)[:100]!r} here.", param=str(unknown)[:100])
        return given


def check_token_ids(given: Any, param: str) -> list[int]:
    """Return what is a list of numbers that could be token ids; raises `ApiError` for anything else."""
    if type(given) is not list or not {type(each) for each in given} <= {int}:
        raise ApiError(400, f"{param} must be an array of token ids.", param=param)
    if given and not 0 <= min(given) <= max(given) < TOKEN_LIMIT:
        raise ApiError(400, f"{param} holds a number that is not a token id.", param=param)
    return given


def check_text(given: str, param: str) -> str:
    """Return a string that is text; raises `ApiError` where it holds half of a surrogate pair."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} holds half of a surrogate pair, which is not text.", param=param) from None
    return given


def check_prompt(given: Any) -> Any:
    """Return a prompt of one of its four kinds; raises `ApiError` for anything else.

    pydantic would try each kind on every element, and describe each failure: a minute for a body of 4 MB.
    """
    if type(given) is str:
        return check_text(given, "prompt")
    kinds = {type(each) for each in given} if type(given) is list else {None}
    if kinds <= {int}:
        return check_token_ids(given, "prompt")
    texts_or_lists = kinds in ({str}, {list})
    if not texts_or_lists or (kinds == {list} and any({type(token) for token in each} - {int} for each in given)):
        raise ApiError(
            400,
            "prompt must be a string, an array of strings, an array of token ids or an array of such arrays.",
            param="prompt",
        )
    if len(given) > MAX_PROMPTS:
        raise ApiError(400, f"A request may hold at most {MAX_PROMPTS} prompts.", param="prompt")
    for each in given:
        check_text(each, "prompt") if type(each) is str else check_token_ids(each, "prompt")
    return given


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(check_prompt, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
]
Tokens = Annotated[
    list[int], PlainValidator(lambda given: check_token_ids(given, "tokens"), json_schema_input_type=list[TokenId])
]


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="send the usage in a last chunk, with no choices")


class CompletionRequest(Strict):
    """The body of POST /v1/completions; null means the default."""

    model: str | None = Field(None, description="an id of /v1/models; the first one if absent", max_length=256)
    prompt: Prompt = Field("", description="text or token ids, one prompt or several; empty: the start of a document")
    best_of: int | None = Field(None, ge=1, le=16, description="sample this many, return the n likeliest")
    echo: bool | None = Field(None, description="return the prompt too, with its log-probabilities if asked")
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(max_length=10)], Annotated[Number, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id -> added to its logit", max_length=1024
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of this many likeliest tokens")
    max_tokens: int | None = Field(None, ge=0, description="0 only together with echo, to score a text")
    n: int | None = Field(None, ge=1, le=16, description="completions for each prompt")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(None, description="strings that end the text")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(None, description="not supported: must be null or empty")
    temperature: Number | None = Field(None, ge=0, le=10)
    top_p: Number | None = Field(None, gt=0, le=1)
    user: str | None = Field(None, max_length=256, description="ignored")
    # Ours: what the engine can do beyond OpenAI's API.
    top_k: int | None = Field(None, ge=0, lt=TOKEN_LIMIT, description="0: all")
    min_p: Number | None = Field(None, ge=0, le=1)
    typical_p: Number | None = Field(None, gt=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0, le=10)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    num_beams: int | None = Field(None, ge=1, le=16, description="beam search, where it is over 1")
    prompt_lookup_tokens: int | None = Field(
        None, ge=0, le=MAX_LOOKUP_TOKENS, description="speculate this far by prompt lookup"
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=TOKEN_LIMIT, description="keep only the last so many prompt tokens; -1: as many as fit"
    )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def check(self) -> None:
        """Refuse what each field allows alone but not together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for stream=true.", param="stream_options")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise ApiError(400, f"best_of ({self.best_of}) cannot be below n ({self.num_choices}).", param="best_of")
        if self.stream and self.best_of is not None and self.best_of > self.num_choices:
            raise ApiError(400, "best_of cannot be streamed; set stream to false.", param="best_of")
        if self.suffix:
            raise ApiError(400, "suffix is not supported: this model cannot fill in; leave it out.", param="suffix")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1 (0 only with echo).", param="max_tokens")
        for text in [self.stop] if isinstance(self.stop, str) else self.stop or []:
            if not 0 < len(text) <= 256:
                raise ApiError(400, "Each stop string must have 1 to 256 characters.", param="stop")

    @property
    def scores(self) -> bool:
        """Whether the prompt's log-probabilities are what is asked for; lm-eval sends this, with one token too many."""
        return bool(self.echo) and self.logprobs is not None and self.max_tokens in (0, 1)

    def sampling(self, max_tokens: int, vocab_size: int, ends: frozenset[int]) -> SamplingSettings:
        """The engine's settings for this request."""
        chosen: dict[str, Any] = {
            "best_of": self.best_of,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._logit_bias(vocab_size, ends),
            "logprobs": self.logprobs,
            "min_p": self.min_p,
            "n": self.n,
            "num_beams": self.num_beams,
            "presence_penalty": self.presence_penalty,
            "prompt_lookup_tokens": self.prompt_lookup_tokens,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_tokens": tuple(self.stop_token_ids or ()),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "typical_p": self.typical_p,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        try:
            return SamplingSettings(max_tokens=max_tokens, echo=bool(self.echo), **given)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def _logit_bias(self, vocab_size: int, ends: frozenset[int]) -> dict[int, float]:
        biases = self.logit_bias or {}
        # A scorer drops the last of the lists' entries as the generated token: so there has to be one.
        kept: dict[int, float] = dict.fromkeys(ends, -100.0) if self.scores else {}
        for key in biases:
            if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
                raise ApiError(
                    400, f"logit_bias names token {key!r}; token ids go from 0 to {vocab_size - 1}.", param="logit_bias"
                )
        return kept | {int(key): float(value) for key, value in biases.items()}


class Logprobs(BaseModel):
    """OpenAI's legacy log-probabilities; bytes that are no text of their own are written `bytes:\\xe2\\x80`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class PromptTokensDetails(BaseModel):
    cached_tokens: int  # read or written for a request before, by the same key, and not read again


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(BaseModel):
    """The answer of POST /v1/completions; streamed, each event is one of these, without usage until the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 and above."""

    error: ErrorDetail


class ModelAnswer(BaseModel):
    """One entry of /v1/models: OpenAI's four fields, and what the registry knows."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    name: str
    selector: str
    version: str
    mlflow_run_id: str
    data_digest: str
    num_parameters: int
    bits_per_byte: float | None
    context_length: int
    vocabulary_size: int
    chat: bool  # whether it has a chat template, and so answers at /v1/chat/completions
    weights: str  # how they are stored while serving
    probe_bits_per_byte: float  # on the probe text, of the weights as stored
    probe_bits_per_byte_change: float  # that, less the same of the weights as registered
    last_swap_error: str | None
    gate_reason: str | None  # why the version has its alias
    refused_challenger: str | None  # which version the gate refused to put in its place last, and why


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]


def describe_validation(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Turn pydantic's findings into one sentence, and the field it is about."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    if error["type"] == "json_invalid":
        reason = str(error.get("ctx", {}).get("error", "not JSON"))
        return f"The body is not valid JSON: {reason}.", None
    param = place[0] if place else None
    if param is None:
        if error["type"] == "missing":
            return "The request has no body; send a JSON object.", None
        return "The body must be a JSON object.", None
    if error["type"] == "missing":
        return f"The field {param!r} is missing.", param
    if error["type"] == "string_unicode":
        return f"{param} holds half of a surrogate pair, which is not text.", param
    message = str(error["msg"])
    return f"{param}: {message[:1].lower()}{message[1:]}.", param
