"""The simulated engine's metrics have the names, types and labels of a running vLLM."""

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engine_sim.metrics import SimMetrics
from benchmarks.engine_sim.options import SimOptions

# As vLLM 0.32.0 with LoRA lists them on CPU; without its `_created` samples, the estimates of
# floating-point operations and the tool parser's counter, which a simulation has no use for.
NAMES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_waiting_by_reason": "gauge",
    "vllm:engine_sleep_state": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:external_prefix_cache_queries": "counter",
    "vllm:external_prefix_cache_hits": "counter",
    "vllm:mm_cache_queries": "counter",
    "vllm:mm_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:prompt_tokens_by_source": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:prompt_tokens_cached_by_source": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:admission_rejections": "counter",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_num_preemptions": "histogram",
    "vllm:request_prefill_kv_computed_tokens": "histogram",
    "vllm:lora_requests_info": "gauge",
    "vllm:cache_config_info": "gauge",
}
EXTRA_LABELS = {
    "vllm:num_requests_waiting_by_reason": {"reason"},
    "vllm:engine_sleep_state": {"sleep_state"},
    "vllm:prompt_tokens_by_source": {"source"},
    "vllm:prompt_tokens_cached_by_source": {"source"},
    "vllm:request_success": {"finished_reason"},
}


def families(**options):
    """Name → family of a fresh exposition."""
    metrics = SimMetrics(SimOptions(**options))
    metrics.note_adapters(["la"])
    text = metrics.text(2, 3, 1, 0.25).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_names_and_types_are_vllms():
    """Exactly the families of the frozen list."""
    assert {name: family.type for name, family in families().items()} == NAMES


def test_labels_are_vllms():
    """Every sample has the model and the engine, and what else vLLM gives it."""
    for name, family in families(model="base").items():
        own = EXTRA_LABELS.get(name, set())
        for sample in family.samples:
            labels = sample.labels
            if name == "vllm:lora_requests_info":
                assert set(labels) == {
                    "max_lora",
                    "running_lora_adapters",
                    "waiting_lora_adapters",
                }
            elif name == "vllm:admission_rejections":
                assert set(labels) == {"model_name", "reason"}
            elif name != "vllm:cache_config_info":
                assert set(labels) - {"le"} == {"model_name", "engine"} | own
                assert (labels["model_name"], labels["engine"]) == ("base", "0")


def test_gauges():
    """Waiting requests are told apart by what they wait for."""
    found = families()
    by_reason = {
        sample.labels["reason"]: sample.value
        for sample in found["vllm:num_requests_waiting_by_reason"].samples
    }
    assert by_reason == {"capacity": 2, "deferred": 1}
    assert found["vllm:kv_cache_usage_perc"].samples[0].value == 0.25


def test_buckets_are_vllms():
    """Token buckets go by 1, 2 and 5 up to the context length; latencies have vLLM's bounds."""
    found = families(max_model_len=100)
    bounds = {
        name: [sample.labels["le"] for sample in found[name].samples if "le" in sample.labels]
        for name in ("vllm:request_prompt_tokens", "vllm:time_to_first_token_seconds")
    }
    prompt = ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "+Inf"]
    assert bounds["vllm:request_prompt_tokens"] == prompt
    assert bounds["vllm:time_to_first_token_seconds"][:3] == ["0.001", "0.005", "0.01"]
    assert len(bounds["vllm:time_to_first_token_seconds"]) == 23


def test_names_are_escaped():
    """A model's name cannot break the format."""
    found = families(model='a"b\\c')
    assert found["vllm:num_requests_running"].samples[0].labels["model_name"] == 'a"b\\c'
