"""64 clients at once on a server of ours, strangers among them: `python -m tests.load` writes results/serving_limits.json.

Each of the 64 asks over and over, streaming or not, and every answer is compared with what `generate` says in this
process. Meanwhile others never end a request's head, send their body a byte at a time, send 100 MB, hang up in the
middle of an answer, or read nothing of one. The page of `ultrafuser demo` is asked in the same way, and eight threads ask
one model. Servers are processes of their own, whose memory is read before and after and may not exceed a limit.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from html import unescape
from pathlib import Path

import psutil
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.http_clients import CHAT, COMPLETIONS, Visitor, ask, free_port, opened, request, said
from tests.support.tiny import specialist, stir_gate, tokenizer
from tests.support.ways import THREADS, WAYS
from ultrafuser.provenance import provenance


OUT = Path(__file__).parent.parent / "results" / "serving_limits.json"
CLIENTS, TOKENS, MEMORY, LARGE = 64, 12, 9 * 2**30, 100 * 2**20
STRANGERS = {"heads without an end": 40, "bodies a byte at a time": 40, "hung up": 10, "reading nothing": 10}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="questions of each client")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = {"provenance": provenance(), "clients": CLIENTS, **run(options.rounds)}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def run(rounds: int, bodies: int = 10) -> dict[str, dict]:
    """All of them.

    Args:
        rounds: Questions of each client.
        bodies: Of 100 MB.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        model = UltraFuserForCausalLM.from_specialists({n: specialist(layers=2) for n in ("text", "code", "math")})
        stir_gate(model)
        # so that an answer is as long as it may be
        model.generation_config.suppress_tokens = [0, 1, 2]
        model.save_pretrained(work)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(work)
        found = {}
        for name, one in {
            "serve": lambda: serve(model, work, rounds, bodies),
            "demo": lambda: demo(model, work, max(1, rounds // 2)),
            "threads": lambda: threads(model, max(1, rounds // 2)),
        }.items():
            found[name] = one()
            print(name, found[name], flush=True)
        return found


def serve(model, folder: str, rounds: int, bodies: int) -> dict:
    """`ultrafuser serve`: how many were answered as they should be, and what became of the others."""
    prompts = [f"what is {i} plus {i}?" for i in range(CLIENTS)]
    expected = [alone(model, prompt) for prompt in prompts]
    chats = [alone(model, f"<user>{prompt}\n<assistant>") for prompt in prompts]

    def answer(port: int, i: int, turn: int) -> tuple[str, bool]:
        if (i + turn) % 3 == 0:
            body = {"messages": [{"role": "user", "content": prompts[i]}], "max_tokens": TOKENS}
            status, found = ask(port, CHAT, body, timeout=300)
            return str(status), status == 200 and found["choices"][0]["message"]["content"] == chats[i]
        body = {"prompt": prompts[i], "max_tokens": TOKENS, "stream": (i + turn) % 3 == 1}
        status, found = ask(port, COMPLETIONS, body, timeout=300)
        if status == 200 and body["stream"]:
            chunks = [json.loads(line[6:]) for line in found.splitlines() if line.startswith("data: ")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        else:
            text = found["choices"][0]["text"] if status == 200 else ""
        return str(status), text == expected[i]

    with started("serve", folder) as (process, port), strangers(port) as met, ThreadPoolExecutor(CLIENTS) as pool:
        # what is made once is made before memory is read
        list(pool.map(lambda i: answer(port, i, 0), range(CLIENTS)))
        before, start = process.memory_info().rss, time.monotonic()
        large = [threading.Thread(target=send_large, args=(port, met)) for _ in range(bodies)]
        for thread in large:
            thread.start()
        asked = [(i, turn) for turn in range(rounds) for i in range(CLIENTS)]
        answers = list(pool.map(lambda one: answer(port, *one), asked))
        for thread in large:
            thread.join()
        seconds, after = time.monotonic() - start, process.memory_info().rss
        well = ask(port, "/health") == (200, {"status": "ok"})
    return {
        "asked": len(asked),
        "answered as alone": sum(right for _, right in answers),
        "answered otherwise": sum(status == "200" and not right for status, right in answers),
        "refused or failed": dict(Counter(status for status, _ in answers if status != "200")),
        "strangers": dict(met),
        "well at the end": well,
        "seconds": round(seconds, 1),
        **memory(before, after),
    }


def demo(model, folder: str, rounds: int) -> dict:
    """`ultrafuser demo`: visitors, half of them steering, and as many who never listen."""
    visitors = 16
    prompts = [f"what is {i} plus {i}?" for i in range(visitors)]

    def answer(port: int, i: int) -> str:
        bias = (30.0 * (i % 2), 0.0, 0.0)
        return unescape(said(Visitor(port).asks(prompts[i], most=TOKENS, bias=bias)))

    from ultrafuser.serve import demo as web

    expected = []
    for i, prompt in enumerate(prompts):
        with web.steered(model.model.fusion_gate, 1.0, (30.0 * (i % 2), 0.0, 0.0)):
            expected.append(alone(model, f"<user>{prompt}\n<assistant>"))
    with started("demo", folder) as (process, port), ThreadPoolExecutor(visitors) as pool:
        list(pool.map(lambda i: answer(port, i), range(visitors)))
        before, right = process.memory_info().rss, 0
        for _ in range(rounds):
            for _ in range(visitors):
                Visitor(port).join(most=1024)
            answers = pool.map(lambda i: answer(port, i), range(visitors))
            right += sum(told == known for told, known in zip(answers, expected, strict=True))
        after = process.memory_info().rss
        well = ask(port, "/")[0] == 200
    return {
        "asked": rounds * visitors,
        "answered as alone": right,
        "never listened": rounds * visitors,
        "well at the end": well,
        **memory(before, after),
    }


def threads(model, rounds: int) -> dict:
    """Eight threads on one model, all ways at once."""
    ways = list(WAYS.values())
    wrong = count = 0
    for _ in range(rounds):
        pairs = [(way, number) for number in range(THREADS) for way in ways]
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda pair: pair[0](model, pair[1]), pairs))
        wrong += sum(one != way(model, number) for one, (way, number) in zip(found, pairs, strict=True))
        count += len(pairs)
    return {"threads": THREADS, "ways": len(ways), "asked": count, "answered otherwise": wrong}


def alone(model, prompt: str) -> str:
    """What `generate` says."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)[0, ids.shape[1] :]
    return tokenizer().decode(ids, skip_special_tokens=True)


def memory(before: int, after: int) -> dict[str, int]:
    """In megabytes."""
    return {"memory before, MB": round(before / 1e6), "memory after, MB": round(after / 1e6)}


@contextmanager
def started(command: str, folder: str):
    """A server in a process of its own, which may take `MEMORY`, and its port."""
    port = free_port()
    words = [sys.executable, "-c", "from ultrafuser.cli import main; main()", command, folder, "--port", str(port)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # noqa: E731
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, preexec_fn=limit)
        try:
            for _ in range(600):
                with suppress(OSError):
                    ask(port, "/health")
                    break
                log.seek(0)
                assert server.poll() is None, log.read()[-3000:]
                time.sleep(0.2)
            yield psutil.Process(server.pid), port
        finally:
            server.kill()
            server.wait()


@contextmanager
def strangers(port: int):
    """Clients that would hold a server up, over and over, until it is left. How many there were."""
    met, over = Counter(), threading.Event()

    def each(kind: str, act) -> None:
        while not over.is_set():
            with suppress(OSError):
                act()
                met[kind] += 1

    def head() -> None:
        with opened(port, b"POST /v1/chat/comp") as connection:
            waits(connection)

    def body() -> None:
        with opened(port, request({"prompt": "2"}, length=500)) as connection:
            for _ in range(20):
                if over.wait(1):
                    return
                connection.sendall(b" ")

    def hangs_up() -> None:
        with opened(port, request({"prompt": "gone", "max_tokens": 200, "stream": True})):
            over.wait(1)

    def reads_nothing() -> None:
        with opened(port, request({"prompt": "2", "max_tokens": 200, "stream": True})):
            over.wait(20)

    def waits(connection) -> None:
        connection.settimeout(1)
        while not over.is_set():
            with suppress(TimeoutError):
                if not connection.recv(100):
                    return

    acts = dict(zip(STRANGERS, (head, body, hangs_up, reads_nothing), strict=True))
    running = [
        threading.Thread(target=each, args=(kind, acts[kind]))
        for kind, number in STRANGERS.items()
        for _ in range(number)
    ]
    for thread in running:
        thread.start()
    try:
        yield met
    finally:
        over.set()
        for thread in running:
            thread.join()


def send_large(port: int, met: Counter) -> None:
    """100 MB at once."""
    try:
        status = ask(port, COMPLETIONS, b" " * LARGE, timeout=300)[0]
    except OSError:
        status = "ended"
    met["100 MB, refused" if status in (413, "ended") else f"100 MB, {status}"] += 1


if __name__ == "__main__":
    main()
