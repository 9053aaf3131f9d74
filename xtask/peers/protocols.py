"""The official OpenAI and Anthropic clients against the endpoints beside chat.

usage: protocols.py BASE_URL MODEL TOOL_MODEL EMBEDDING_MODEL

TOOL_MODEL answers with a call of the tool `weather`. Prints one JSON line; the
exit code is 1 when a check fails.
"""

import json
import sys

import anthropic
import openai

base, model, tool_model, embedder = sys.argv[1].rstrip("/"), *sys.argv[2:5]
found = {}


def check(name, holds, detail):
    found[name] = {"passed": bool(holds), "detail": str(detail)[:300]}


claude = anthropic.Anthropic(base_url=base, api_key="unused", max_retries=0, timeout=60)
hello = [{"role": "user", "content": "Hello there"}]
whole = claude.messages.create(model=model, max_tokens=24, system="Be brief.", messages=hello)
check("messages", whole.content[0].type == "text" and whole.stop_reason in ("end_turn", "max_tokens"), whole)
with claude.messages.stream(model=model, max_tokens=24, system="Be brief.", messages=hello) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
check("messages stream equals whole", text == whole.content[0].text == final.content[0].text, text)
check("messages usage", final.usage.output_tokens == whole.usage.output_tokens > 0, final.usage)

tools = [{"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
called = claude.messages.create(model=tool_model, max_tokens=64, tools=tools, messages=hello)
use = [b for b in called.content if b.type == "tool_use"]
check("messages tool", called.stop_reason == "tool_use" and use and use[0].input == {"city": "Köln"}, called)
with claude.messages.stream(model=tool_model, max_tokens=64, tools=tools, messages=hello) as stream:
    final = stream.get_final_message()
check("messages tool stream", [b.to_dict() for b in final.content] == [b.to_dict() for b in called.content], final)
back = hello + [
    {"role": "assistant", "content": [b.to_dict() for b in called.content]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use[0].id, "content": "warm"}]},
]
check("messages tool result", claude.messages.create(model=tool_model, max_tokens=64, tools=tools, messages=back).content, "")
try:
    claude.messages.create(model="no-such-model", max_tokens=4, messages=hello)
    check("messages unknown model", False, "nothing was raised")
except anthropic.NotFoundError as error:
    check("messages unknown model", error.body["error"]["type"] == "not_found_error", error.body)

client = openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0, timeout=60)
response = client.responses.create(model=model, input="Hello there", instructions="Be brief.", max_output_tokens=24)
check("responses", response.output_text and response.status in ("completed", "incomplete"), response)
text, done = "", None
for event in client.responses.create(model=model, input="Hello there", instructions="Be brief.", max_output_tokens=24, stream=True):
    if event.type == "response.output_text.delta":
        text += event.delta
    if event.type in ("response.completed", "response.incomplete"):
        done = event.response
check("responses stream equals whole", text == response.output_text == done.output_text, text)
check("responses usage", done.usage.total_tokens == response.usage.total_tokens > 0, done.usage)
with client.responses.stream(model=tool_model, input="Hello there") as stream:
    final = stream.get_final_response()
calls = [o for o in final.output if o.type == "function_call"]
check("responses tool", calls and json.loads(calls[0].arguments) == {"city": "Köln"}, final)
try:
    client.responses.create(model=model, input="x", previous_response_id="resp_1")
    check("responses state", False, "nothing was raised")
except openai.BadRequestError as error:
    check("responses state", error.param == "previous_response_id", error)

# The client asks for base64 by itself and decodes it.
packed = client.embeddings.create(model=embedder, input=["one two", "three"])
plain = client.embeddings.create(model=embedder, input=["one two", "three"], encoding_format="float")
near = all(abs(a - b) < 1e-6 for p, q in zip(packed.data, plain.data) for a, b in zip(p.embedding, q.embedding))
check("embeddings", len(packed.data) == 2 and near and packed.usage.prompt_tokens > 0, packed.usage)

passed = all(c["passed"] for c in found.values())
versions = f"anthropic {anthropic.__version__}, openai {openai.__version__}"
print(json.dumps({"client": versions, "passed": passed, "checks": found}, ensure_ascii=False))
sys.exit(not passed)
