"""`metasepia chat` and `metasepia complete`: text from a backbone, with an expert where one is named."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.shell import INTERRUPTED, MISUSE, REFUSED, Failed, add_verb, failed, for_people, given, show, text_of

if TYPE_CHECKING:
    import metasepia.client.results

HELP = "/new begins again, /system TEXT sets the system's message, /model NAME asks another model, /quit or Ctrl-D ends"


def chat(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    model = model_of(client, options)
    history: list[dict[str, str]] = []
    if options.system is not None:
        history.append({"role": "system", "content": options.system})
    if options.message is None and sys.stdin.isatty():
        if options.json:
            raise Failed("--json is for one message; give it, or pipe it in", MISUSE)
        _talk(client, options, model, history)
        return
    history.append({"role": "user", "content": _said(options.message)})
    if options.json or options.no_stream:
        found = client.chat(history, model=model, **_sampling(options))
        show(options, found.raw, lambda: print(for_people(found.text)))
    else:
        _stream(client.stream_chat(history, model=model, **_sampling(options)))


def complete(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    model, prompt = model_of(client, options), _said(options.prompt)
    if options.json or options.no_stream:
        found = client.complete(prompt, model=model, **_sampling(options))
        show(options, found.raw, lambda: print(for_people(found.text)))
    else:
        _stream(client.stream_complete(prompt, model=model, **_sampling(options)))


def model_of(client: "metasepia.client.Client", options: argparse.Namespace) -> str:
    """The model to ask: as named, or the first backbone; with the expert where one is named. Raises Failed."""
    model = options.model
    if model is None:
        backbones = [one.id for one in client.models() if one.kind == "backbone"]
        if not backbones:
            raise Failed("this server has no backbone; --model names what to ask", REFUSED)
        model = backbones[0]
    if options.expert is None:
        return model
    if ":" in model or model == "auto":
        raise Failed(f"--expert {options.expert} is of a backbone, and --model {model} is none", MISUSE)
    return f"{model}:{options.expert}"


def _talk(
    client: "metasepia.client.Client", options: argparse.Namespace, model: str, history: list[dict[str, str]]
) -> None:
    """A conversation, until the end of the input. What the server refuses is said, and the last message taken back."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines and remembers them)
    print(f"{model} at {client.url}; {HELP}", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        verb, _, rest = said.partition(" ")
        if not said:
            continue
        if verb == "/quit":
            return
        if verb == "/new":
            history[:] = [one for one in history if one["role"] == "system"]
        elif verb == "/system" and rest:
            history[:] = [{"role": "system", "content": rest}, *[one for one in history if one["role"] != "system"]]
        elif verb == "/model" and rest:
            model = rest.strip()
        elif verb.startswith("/"):
            print(HELP, file=sys.stderr)
        else:
            history.append({"role": "user", "content": said})
            answer = _reply(client, options, model, history)
            history.append({"role": "assistant", "content": answer}) if answer else history.pop()


def _reply(
    client: "metasepia.client.Client", options: argparse.Namespace, model: str, history: list[dict[str, str]]
) -> str:
    """The answer; as far as it came where it was interrupted, nothing where it was refused."""
    stream = client.stream_chat(history, model=model, **_sampling(options))
    try:
        return _stream(stream)
    except KeyboardInterrupt:
        stream.close()
        print("(interrupted)", file=sys.stderr)
        return stream.text
    except Exception as error:
        ending = failed(error)
        if ending is None or ending.status == INTERRUPTED:
            raise
        print(f"metasepia: {ending.message}", file=sys.stderr)
        return ""


def _stream(stream: Any) -> str:
    """Prints the pieces as they come; the whole text."""
    with stream as pieces:
        try:
            for piece in pieces:
                if piece.index == 0:
                    print(for_people(piece.text), end="", flush=True)
        finally:
            if stream.text:
                print()
    return stream.text


def _said(text: str | None) -> str:
    """The argument, or standard input."""
    said = text_of(Path("-")).strip("\n") if text in (None, "-") else text
    assert said is not None
    if not said.strip():
        raise Failed("the message is empty", REFUSED)
    return said


def _sampling(options: argparse.Namespace) -> Any:
    return given(options, "temperature", "top_p", "max_tokens", "seed", "stop")


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs `metasepia chat` and `metasepia complete`."""
    one = add_verb(things, "chat", chat, "talk with a model, or ask it once", shared)
    one.add_argument("message", nargs="?", help="one question; without it a conversation, or standard input")
    one.add_argument("--system", metavar="TEXT", help="the system's message")
    _add_sampling(one)
    one = add_verb(things, "complete", complete, "what follows a prompt, without a chat template", shared)
    one.add_argument("prompt", nargs="?", help="standard input where not given")
    _add_sampling(one)


def _add_sampling(to: argparse.ArgumentParser) -> None:
    to.add_argument("--model", metavar="NAME", help="the first backbone where not given; auto lets the server choose")
    to.add_argument("--expert", metavar="NAME", help="of that backbone")
    to.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token always")
    to.add_argument("--top-p", type=float, metavar="P")
    to.add_argument("--max-tokens", type=int, metavar="N")
    to.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    to.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be given several times")
    to.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
