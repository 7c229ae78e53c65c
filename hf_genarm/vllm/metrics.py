"""
Counters of guidance, which are among the metrics of vLLM.

Those of the front end always are. Those of the engine, which is another process, are there if the environment variable
`PROMETHEUS_MULTIPROC_DIR` names a folder for both, as `python -m hf_genarm.vllm` sees to.
"""

from prometheus_client import Counter, Gauge

from .batch_guidance import BatchGuidance

GUIDED_REQUESTS = Counter("genarm:guided_requests", "Requests that were accepted and are guided.")
REFUSED_REQUESTS = Counter("genarm:refused_requests", "Requests that the processor refused because of their guidance.")
_TOTALS = {
    "n_read": Counter("genarm:reward_tokens", "Tokens that reward models have read."),
    "n_found": Counter("genarm:found_tokens", "Tokens that need not be read, since an earlier text began with them."),
    "n_dropped": Counter("genarm:dropped_texts", "Texts of running requests that were dropped for lack of memory."),
    "n_unguided": Counter("genarm:unguided_requests", "Requests that were answered without guidance, see the log."),
}
_PAGES = Gauge("genarm:page_usage", "Share of the pages that running requests hold.", multiprocess_mode="max")


class EngineMetrics:
    """
    Brings the metrics of an engine up to date.

    Args:
        guidance ([`BatchGuidance`]):
            The guidance of the engine.
    """

    def __init__(self, guidance: BatchGuidance):
        self._guidance, self._seen = guidance, dict.fromkeys(_TOTALS, 0)

    def update(self) -> None:
        """Adds what has happened since the last call."""
        lms = [model.lm for model in self._guidance.all_models()]
        totals = {
            "n_read": sum(lm.n_read for lm in lms),
            "n_found": sum(lm.pages.n_found for lm in lms),
            "n_dropped": sum(lm.pages.n_dropped for lm in lms),
            "n_unguided": self._guidance.n_unguided,
        }
        for name, total in totals.items():
            if total > self._seen[name]:
                _TOTALS[name].inc(total - self._seen[name])
        self._seen = totals
        _PAGES.set(max((lm.pages.n_in_use / lm.pages.n_pages for lm in lms), default=0.0))
