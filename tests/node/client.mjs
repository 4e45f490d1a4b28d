// The official client against a running graph: `node client.mjs URL MODEL ENCODER`; prints what it got as one line of JSON.
import OpenAI from "openai";

const [url, model, encoder] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model, messages, max_tokens: 24, temperature: 0 };
const said = {};

said.models = [];
for await (const one of client.models.list()) said.models.push(one.id);
said.retrieved = (await client.models.retrieve(model)).id;

const whole = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 });
said.text = whole.choices[0].message.content;
said.tokens = whole.choices[0].logprobs.content.map((one) => one.token);
said.top = whole.choices[0].logprobs.content.map((one) => one.top_logprobs.length);
said.receipt = whole.receipt.path;

const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
said.streamed = "";
for await (const chunk of stream) {
  said.streamed += chunk.choices[0]?.delta?.content ?? "";
  said.usage = chunk.usage ?? said.usage;
}

const plain = await client.completions.create({ model, prompt: ["One, two,", "Red, green,"], max_tokens: 4, temperature: 0, n: 2, seed: 1 });
said.choices = plain.choices.map((one) => one.index);

const { data } = await client.embeddings.create({ model: encoder, input: ["one body", "any colour"] });
said.norms = data.map((one) => Math.hypot(...one.embedding));
said.width = data[0].embedding.length;
const short = await client.embeddings.create({ model: encoder, input: "one body", dimensions: 8 });
said.short = short.data[0].embedding.length;

said.errors = [];
for (const wrong of [{ ...asked, model: "nobody" }, { ...asked, max_tokens: 0 }, { ...asked, tools: [{ type: "function", function: { name: "f" } }] }]) {
  try {
    await client.chat.completions.create(wrong);
  } catch (error) {
    said.errors.push([error.constructor.name, error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(said));
