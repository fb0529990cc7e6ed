"""The OpenAI frontend: one process that turns HTTP into sequences on workers, and tokens into text.

service.py      life of the process: status socket, start, drain, exit
app.py          routes, host check, body cap, replies
schemas.py      the bodies that are understood, and what is refused by name
errors.py       what a client is told, in OpenAI's shape
intake.py       body → `Task`, or a 400 that names the field
templates.py    sandboxed chat templates
tokenizer.py    text → ids, cached by segment
preprocess.py   task → prompt tokens, block hashes, sampling
routing.py      the router: placements as leases
workers.py      the workers: one connection each, sequences on it
requests.py     one request's life, from admission to release
detokenize.py   ids → text, never half a character
stops.py        stop strings across token borders
output.py       ids of one sequence → the text a client may see, and why it ended
stream.py       the JSON and SSE that carry it
stats.py        figures for the supervisor, metrics for Prometheus
"""
