"""A process of a cell that answers at once, for tests of everything around the measurement."""

_FACTS = {"provider": "fake", "threads": 1, "option": ["an.option", "1"]}


class InstantWorker:
    """Answers as a process of a cell does, without a process."""

    pid = 0

    def __init__(self, *_):
        pass

    def load(self, timeout_s):
        memory = {"bare": 1, "imports": 2, "load": 3, "method": "none"}
        return {"load_us": 100, "cold_start_us": 900, "facts": _FACTS, "memory": memory}

    def ask(self, message, timeout_s):
        if message["do"] == "peak":
            return {"peak": 5}
        if message["do"] == "exactness":
            return {"exact": [5] * 20, "saturating": [4] * 20}
        if message["do"] == "exits":
            return {"exits": [sentence % 3 for sentence in message["sentences"]]}
        if message["do"] == "server":
            count = len(message["sentences"])
            return {"us": [200] * count, "sizes": [1] * count}
        batches = message.get("batches", [])
        if message["do"] == "pauses":
            us = [[100 + pause_us // 1000] * len(batches) for pause_us in message["pauses_us"]]
            return {"us": us, "tokenizing_us": [], "resident_us": [], "answers": [], "probabilities": []}
        return {
            "us": [[100 + len(batch) for batch in batches]],
            "tokenizing_us": [9] * len(batches) if message.get("tokenizing") else [],
            "resident_us": [],
            "answers": [[1] * len(batch) for batch in batches],
            "probabilities": [[[2000, 8000]] * len(batch) for batch in batches],
        }

    def close(self):
        pass
