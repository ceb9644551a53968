"""The child of `guard`: opens one tokenizer or chat template and works on what it is sent, within limits.

First message: what to open. `{"kind": "tokenizer", "spec": tokenizer.json as text}`; `{"kind": "ranks", "ranks":
[[bytes in hex, rank], ...], "pattern": ...}`; `{"kind": "sentencepiece", "model": ModelProto in hex, "prefix": whether
it may put a space in front of a text}`; `{"kind": "template", "template": Jinja, "names": special tokens}`;
`{"kind": "library", "folder": a folder that transformers opens}`, the only one that reads more than the pipe. Each
message after it is a piece of work; its answer is JSON and, for tokens, their ids as int32. Nothing is written.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.stages.tokens.guard import Limits, UnopenedError, bound_this_process, receive, send

Work = Callable[[dict[str, Any]], tuple[Any, bytes]]


def main() -> None:
    """Answer messages until there are no more."""
    # A Ctrl-C and a notice are the parent's business; when it is gone the pipe ends, and so do we.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    work: Work | None = None
    while True:
        try:
            seconds, memory, arguments = json.loads(receive(sys.stdin.buffer))
        except EOFError:
            return
        bound_this_process(Limits(seconds, memory))
        answer: Any
        try:
            if work is None:
                work, answer, raw = _open(arguments), {}, b""
            else:
                answer, raw = work(arguments)
        except MemoryError:
            answer, raw = {"failure": "out of memory"}, b""
        except UnopenedError as error:
            answer, raw = {"failure": error.reason}, b""
        except BaseException as error:  # a panic of a Rust library is no Exception
            answer, raw = {"failure": f"{' '.join(str(error).split())[:80] or type(error).__name__}"}, b""
        send(answers, json.dumps(answer).encode())
        send(answers, raw)


def _open(setup: dict[str, Any]) -> Work:
    openers: dict[str, Callable[[dict[str, Any]], Work]] = {
        "tokenizer": _tokenizer, "ranks": _ranks, "sentencepiece": _sentencepiece, "template": _template,
        "library": _library,
    }  # fmt: skip
    return openers[setup["kind"]](setup)


def _tokenizer(setup: dict[str, Any]) -> Work:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(setup["spec"])
    tokenizer.encode_special_tokens = bool(setup["seal"])

    def work(arguments: dict[str, Any]) -> tuple[Any, bytes]:
        encodings = tokenizer.encode_batch_fast(arguments["texts"], add_special_tokens=False)
        return _ids([encoding.ids for encoding in encodings])

    return work


def _ranks(setup: dict[str, Any]) -> Work:
    import tiktoken

    ranks = {bytes.fromhex(data): rank for data, rank in setup["ranks"]}
    encoding = tiktoken.Encoding("guarded", pat_str=setup["pattern"], mergeable_ranks=ranks, special_tokens={})

    def work(arguments: dict[str, Any]) -> tuple[Any, bytes]:
        return _ids([encoding.encode_ordinary(text) for text in arguments["texts"]])

    return work


def _sentencepiece(setup: dict[str, Any]) -> Work:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = bytes.fromhex(setup["model"])
    if not setup["prefix"]:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        proto.normalizer_spec.add_dummy_prefix = False
        model = proto.SerializeToString()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)

    def work(arguments: dict[str, Any]) -> tuple[Any, bytes]:
        if "pieces" not in arguments:
            return _ids([library.encode(text) for text in arguments["texts"]])
        ids = range(library.vocab_size())
        silent = [i for i in ids if library.is_control(i) or library.is_unknown(i) or library.is_unused(i)]
        return (
            [library.id_to_piece(i) for i in ids], silent, [i for i in ids if library.is_byte(i)], library.bos_id(),
            library.eos_id(), library.unk_id(), [library.normalize(probe) for probe in arguments["pieces"]],
        ), b""  # fmt: skip

    return work


def _ids(lists: list[list[int]]) -> tuple[Any, bytes]:
    flat = np.array([i for ids in lists for i in ids], "<i4")
    return [len(ids) for ids in lists], flat.tobytes()


def _library(setup: dict[str, Any]) -> Work:
    os.environ["HF_HUB_OFFLINE"] = "1"  # some classes ask the hub what a folder may be
    from bytecache.stages.tokens.library import Here

    folder = Here(Path(setup["folder"]), setup["folder"])

    def work(arguments: dict[str, Any]) -> tuple[Any, bytes]:
        asks: dict[str, Callable[..., Any]] = {
            "facts": folder.facts, "ids": folder.ids, "differences": folder.differences,
        }  # fmt: skip
        ask = asks[arguments.pop("work")]
        return ask(**arguments), b""

    return work


def _template(setup: dict[str, Any]) -> Work:
    from datetime import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    date = datetime.fromisoformat(setup["date"])

    def work(arguments: dict[str, Any]) -> tuple[Any, bytes]:
        rendered = []
        for messages, prompt in arguments["renderings"]:
            tools = [tool for message in messages for tool in message.pop("tools", [])]
            (text,), _ = render_jinja_template(
                conversations=[messages], tools=tools or None, chat_template=setup["template"],
                add_generation_prompt=prompt, **{**setup["names"], "strftime_now": date.strftime},
            )  # fmt: skip
            rendered.append(str(text))
            if len(rendered[-1]) > arguments["longest"]:
                raise ValueError(f"more than {arguments['longest']} characters")
        return rendered, b""

    return work


if __name__ == "__main__":
    main()
