"""The OpenAI frontend: one process that turns HTTP into sequences on workers, and tokens into text.

service.py         life of the process: status socket, start, drain, exit
server.py          the HTTP server, on a socket that outlives the process
app.py             routes
guard.py           who may ask at all: this machine, by a loopback name
serving.py         what the endpoints share
generation.py      one request from its body to the last byte of its answer
reply.py           that answer over plain ASGI; reading a body with a cap
schemas.py         the bodies that are understood, and what is refused by name
intake.py          body → `Task`, or a 400 that names the field
priorities.py      what a request and parts of its prompt are worth
templates.py       sandboxed chat templates
control_tokens.py  special tokens, and how messages are kept from writing them
segments.py        a cache of what was tokenised lately
tokenizer.py       text → ids
extent.py          how few ids a text can be
preprocess.py      task → prompt tokens, block hashes, limits
requests.py        live requests: admission, interruption, stalls, drain
execution.py       one request on the workers: placed, run, placed again
routing.py         the router: placements as leases
workers.py         the workers: one connection each, sequences on it
reconnect.py       connections that are made again
detokenize.py      ids → text, never half a character
stops.py           stop strings across token borders
output.py          ids of one sequence → what a client may see, and why it ended
stream.py          the JSON and SSE that carry it
sleepers.py        models that sleep, and the requests that wait for them
asking.py          what is asked of the supervisor, and its answers
acts.py            sleep and wake as endpoints
stats.py           figures for the supervisor, counts for metrics
tier_metrics.py    the KV tiers in metrics
errors.py          OpenAI-shaped errors
"""
