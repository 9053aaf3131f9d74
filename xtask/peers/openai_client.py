"""The official OpenAI client against a running Ashlar server.

usage: openai_client.py BASE_URL MODEL [LONG_PROMPT]

BASE_URL is the server's root. LONG_PROMPT is something the model answers at
length, so that the stream can be cancelled in the middle. Prints one JSON line;
the exit code is 1 when a check fails.
"""

import json
import re
import sys
import time

import httpx
import openai

base, model = sys.argv[1].rstrip("/"), sys.argv[2]
long_prompt = sys.argv[3] if len(sys.argv) > 3 else "Count from one to five hundred in words, one number a line."
client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0, timeout=120)
found = {}


def check(name, holds, detail):
    found[name] = {"passed": bool(holds), "detail": detail}


def refused(kind, call):
    """The error that `call` ends with, when it is of `kind`."""
    try:
        call()
    except kind as error:
        return error
    except openai.OpenAIError as error:
        check(f"raised {kind.__name__}", False, f"{type(error).__name__}: {error}")
    else:
        check(f"raised {kind.__name__}", False, "nothing was raised")
    return None


def ask(prompt, **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **more)


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


check("models", model in [m.id for m in client.models.list()], model)

settings = {"temperature": 0, "max_tokens": 24}
whole = ask("Hello there", **settings)
text, usage, role, finish = "", None, None, None
for chunk in ask("Hello there", stream=True, stream_options={"include_usage": True}, **settings):
    if chunk.choices:
        role = role or chunk.choices[0].delta.role
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    usage = chunk.usage or usage
check("stream equals whole", text == whole.choices[0].message.content, text[:200])
check("stream ends", role == "assistant" and finish == whole.choices[0].finish_reason, f"{role}, {finish}")
check("usage", usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, str(usage))

completion = client.completions.create(model=model, prompt="Hello there", **settings)
check("completions", completion.object == "text_completion" and completion.usage, completion.choices[0].text[:200])


def cancelled():
    page = httpx.get(f"{base}/metrics").text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in page.splitlines()
        if line.startswith("ashlar:request_success_total") and 'finished_reason="cancelled"' in line
    )


before = cancelled()
stream = ask(long_prompt, stream=True, temperature=0, max_tokens=400)
read = 0
for chunk in stream:
    read += bool(chunk.choices and chunk.choices[0].delta.content)
    if read >= 3:
        break
stream.close()
deadline = time.monotonic() + 10
while cancelled() == before and time.monotonic() < deadline:
    time.sleep(0.05)
check("cancel", cancelled() == before + 1, f"{read} chunks read, cancelled {before} -> {cancelled()}")

error = refused(openai.NotFoundError, lambda: client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "x"}]))
if error:
    check("unknown model", error.code == "model_not_found" and model in str(error), str(error))

error = refused(openai.BadRequestError, lambda: ask("word " * 60000))
if error:
    check("oversized prompt", error.code == "context_length_exceeded" and len(numbers(error.body["message"])) >= 2, error.body["message"])

error = refused(openai.BadRequestError, lambda: ask("x", extra_body={"tools": [{"type": "function", "function": {"name": "f"}}]}))
if error:
    check("unsupported field", error.param == "tools", str(error))
error = refused(openai.BadRequestError, lambda: ask("x", extra_body={"temprature": 1}))
if error:
    check("unknown field", "temprature" in error.body["message"], str(error))

reply = httpx.post(f"{base}/v1/chat/completions", content=b'{"model": ', headers={"content-type": "application/json"})
check("malformed JSON", reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error", reply.text[:200])

passed = all(c["passed"] for c in found.values())
print(json.dumps({"client": f"openai {openai.__version__}", "passed": passed, "checks": found}))
sys.exit(not passed)
