// The request of the playground as a program: curl, Python, gRPC.

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const python = (value) => JSON.stringify(value).replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");

/** The program in a language. root: the server's address. path, body: of the request. needsKey: whether it goes with a key. */
export function snippet(language, root, path, body, needsKey) {
  return { curl, python: openai, grpc }[language](root, path, body, needsKey);
}

function curl(root, path, body, needsKey) {
  const key = needsKey ? ` -H "Authorization: Bearer $ORTHRUS_KEY"` : "";
  return `curl -N ${root}/${path} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}\n`;
}

function openai(root, path, body, needsKey) {
  const chat = path.includes("chat");
  const known = new Set(["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"]);
  const lines = [];
  const extra = {};
  for (const [name, value] of Object.entries(body)) {
    if (name === "stream") continue;
    if (known.has(name)) lines.push(`    ${name}=${python(value)},`);
    else extra[name] = value;
  }
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const shown = chat ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  return `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${python(`${root}/v1`)}, api_key=${needsKey ? `os.environ["ORTHRUS_KEY"]` : `"none"`})
stream = client.${chat ? "chat.completions" : "completions"}.create(
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    print(${shown}, end="", flush=True)
`;
}

function grpc(root, path, body, needsKey) {
  const chat = path.includes("chat");
  const sampling = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"]
    .filter((name) => body[name] !== undefined)
    .map((name) => `${name}=${name === "stop" ? python([body[name]].flat()) : python(body[name])}`);
  const input = chat
    ? `messages=[pb.ChatMessage(role="user", content=${python(body.messages[0].content)})]`
    : `prompt=${python(body.prompt)}`;
  const metadata = needsKey ? `, metadata=[("authorization", "Bearer " + os.environ["ORTHRUS_KEY"])]` : "";
  return `${needsKey ? "import os\n\n" : ""}import grpc

# The package of this server, orthrus-serve. Other languages use its orthrus.proto.
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub

# The port is grpc_options.port of the server's config.
with grpc.insecure_channel("${new URL(root).hostname}:9000") as channel:
    request = pb.${chat ? "ChatRequest" : "GenerateRequest"}(
        model=${python(body.model)},
        ${input},
        sampling=pb.SamplingParams(${sampling.join(", ")}),
    )
    for chunk in OrthrusStub(channel).${chat ? "ChatStream" : "GenerateStream"}(request${metadata}):
        print(chunk.${chat ? "content" : "text"}, end="", flush=True)
`;
}
