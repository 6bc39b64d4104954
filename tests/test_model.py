"""model.py: the hook, the sampler, token log-probs, files."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_llm, rollouts, subject_of
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import model
from data.problems import problems_of
from plumbing import loading
from plumbing.vllm import VLLM

STOP = [2, 7, 11, 13, 17, 19, 23, 29]  # many stop tokens, so that the lengths of random answers vary


def logits(llm, ids):
    return llm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def vector(seed=0, size=1.0):
    return size * torch.randn(32, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ the hook


def test_zero_vector_is_the_base_model(llm, prompts):
    want = logits(llm, prompts[0])
    with model.steer(llm, {layer: torch.zeros(32) for layer in range(3)}):
        assert torch.equal(logits(llm, prompts[0]), want)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_vector_is_added_to_the_residual_stream_after_its_layer(llm, prompts, layer):
    """Against running the layers by hand: the output of layer l plus s, everywhere else as ever."""
    seen, s = {}, vector()

    def inputs_of(name, block):
        def hook(module, args, kwargs):
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return block.register_forward_pre_hook(hook, with_kwargs=True)

    after = [*model.decoder_layers(llm)[1:], llm.get_decoder().norm]  # what reads the output of layer 0, 1, 2
    handles = [inputs_of(i, block) for i, block in enumerate(after)]
    base = logits(llm, prompts[0])
    plain = dict(seen)
    with model.steer(llm, {layer: s}):
        steered = logits(llm, prompts[0])
    for handle in handles:
        handle.remove()
    for below in range(layer):
        assert torch.equal(seen[below], plain[below])
    torch.testing.assert_close(seen[layer], plain[layer] + s, rtol=0, atol=1e-5)  # every position
    assert (steered - base).abs().max() > 0.1


def test_hook_equals_a_bias_of_down_proj(qwen2, prompts):
    s = vector()
    with model.steer(qwen2, {1: s}):
        hooked = logits(qwen2, prompts[0])
    down = qwen2.model.layers[1].mlp.down_proj
    down.bias = torch.nn.Parameter(s)
    torch.testing.assert_close(hooked, logits(qwen2, prompts[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma", "gemma2"])
def test_sites(family, prompts):
    """A layer written out, with a vector after each component (arXiv:2509.06608, Fig. 10), against the hooks."""
    llm = random_llm(family)
    block, seen = llm.model.layers[1], {}

    def before(module, args, kwargs):
        seen["x"], seen["how"] = args[0], kwargs

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        llm.model.layers[2].register_forward_pre_hook(lambda module, args: seen.update(z=args[0])),
    ]
    for site in model.SITES:
        s = {place: torch.zeros(32) for place in model.SITES} | {site: vector()}
        with model.steer(llm, {f"1.{site}": s[site]}):
            logits(llm, prompts[0])
        same = torch.nn.Identity()
        if family == "gemma2":
            after_attention, before_mlp, after_mlp = (
                block.post_attention_layernorm, block.pre_feedforward_layernorm, block.post_feedforward_layernorm
            )  # fmt: skip
        else:
            after_attention, before_mlp, after_mlp = same, block.post_attention_layernorm, same
        x = seen["x"]
        attended = block.self_attn(hidden_states=block.input_layernorm(x) + s["input-norm"], **seen["how"])[0]
        y = x + after_attention(attended) + s["attention"]
        z = y + after_mlp(block.mlp(before_mlp(y) + s["post-attention-norm"])) + s["end"]
        torch.testing.assert_close(seen["z"], z, rtol=0, atol=1e-5)
        if site != "input-norm":
            logits(llm, prompts[0])
            assert (seen["z"] - z).abs().max() > 0.1  # what the vector made
    for handle in handles:
        handle.remove()


def test_sites_of_models_that_are_not_known_are_refused():
    llm = random_llm("gemma")
    llm.config.model_type = "another"
    with pytest.raises(SystemExit, match="the site attention is known for qwen2.*not for 'another'"):
        model.site_module(llm, "1.attention")
    assert model.site_module(llm, 1) is llm.model.layers[1]


def test_lora_equals_a_changed_weight(qwen2, prompts):
    """B A x beside W x is (W + B A) x (arXiv:2505.18706, App. D)."""
    draw = torch.Generator().manual_seed(3)
    A, B = torch.randn(4, 40, generator=draw) / 6, torch.randn(32, 4, generator=draw)
    base = logits(qwen2, prompts[0])
    with model.steer(qwen2, {"1.lora_A": A, "1.lora_B": torch.zeros(32, 4)}):
        assert torch.equal(logits(qwen2, prompts[0]), base)
    with model.steer(qwen2, {"1.lora_A": A, "1.lora_B": B}):
        steered = logits(qwen2, prompts[0])
    qwen2.model.layers[1].mlp.down_proj.weight += B @ A
    torch.testing.assert_close(steered, logits(qwen2, prompts[0]), rtol=0, atol=1e-5)
    assert (steered - base).abs().max() > 0.1


def test_lora_of_rank_one_is_a_vector_with_a_size_for_every_token(qwen2, prompts):
    """With an A that gives every token 1, it is the vector B[:, 0]."""
    kept = []
    down = qwen2.model.layers[1].mlp.down_proj
    handle = down.register_forward_hook(lambda module, args, output: kept.append(args[0]))
    logits(qwen2, prompts[0])
    handle.remove()
    x = kept[0][0]  # (T, F), more columns than rows: some A gives every row 1
    A = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution.T
    torch.testing.assert_close(x @ A.T, torch.ones(len(x), 1), rtol=0, atol=1e-4)
    s = vector()
    with model.steer(qwen2, {"1.lora_A": A, "1.lora_B": s[:, None]}):
        adaptive = logits(qwen2, prompts[0])
    with model.steer(qwen2, {1: s}):
        torch.testing.assert_close(adaptive, logits(qwen2, prompts[0]), rtol=0, atol=1e-3)


def test_hook_is_gone_after_an_error(qwen2, prompts):
    want = logits(qwen2, prompts[0])
    with pytest.raises(KeyError), model.steer(qwen2, {1: vector()}):
        raise KeyError
    assert torch.equal(logits(qwen2, prompts[0]), want)
    with pytest.raises(IndexError), model.steer(qwen2, {1: vector(), 9: vector()}):  # fails while hooks are being made
        pass
    assert torch.equal(logits(qwen2, prompts[0]), want)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_any_module_of_a_layer_may_get_a_vector(qwen2, prompts, path):
    """A vector after a linear module is a bias of it, whatever its width; a LoRA there is a change of its weight."""
    module = qwen2.model.layers[1].get_submodule(path)
    s, base = torch.randn(module.out_features, generator=torch.Generator().manual_seed(0)), logits(qwen2, prompts[0])
    with model.steer(qwen2, {f"1.{path}": s}):
        steered = logits(qwen2, prompts[0])
    assert (steered - base).abs().max() > 0.1
    A, B = torch.randn(2, 32) / 6, torch.randn(module.out_features, 2)
    with model.steer(qwen2, {f"1.{path}.lora_A": A, f"1.{path}.lora_B": B}):
        adapted = logits(qwen2, prompts[0])
    old = module.bias
    module.bias = torch.nn.Parameter(s if old is None else old + s)
    torch.testing.assert_close(steered, logits(qwen2, prompts[0]), rtol=0, atol=1e-5)
    module.bias = old
    module.weight += B @ A
    torch.testing.assert_close(adapted, logits(qwen2, prompts[0]), rtol=0, atol=1e-4)
    for place, message in {
        "1.middle": "has no 'middle'; sites are",
        "1.mlp.lora_A": "a LoRA goes on a linear module",
    }.items():
        with pytest.raises(SystemExit, match=message):
            model.site_module(qwen2, place)


def by_hand(llm, prompt, completion, s, layer=1):
    """Logits with s added at the positions that predict the completion only, by a hook that knows them."""
    start = len(prompt) - 1

    def add(module, args, h):
        return torch.cat([h[:, :start], h[:, start:] + s], 1)

    handle = model.decoder_layers(llm)[layer].register_forward_hook(add)
    found = logits(llm, prompt + completion)
    handle.remove()
    return found


def test_vectors_at_answer_positions_only(llm, prompts):
    """Sampler and log-probs agree with each other and with positions written out; prompts are left as they are."""
    s = vector(size=2)
    with model.steer(llm, {"1@answer": s}):
        completions, _ = model.sample(llm, prompts, 1, 6, [], temperature=0)
        logps, mask = model.token_logps(llm, prompts, completions)
    everywhere, _ = model.sample(llm, prompts, 1, 6, [], temperature=0)
    assert everywhere != completions
    for i, (p, c) in enumerate(zip(prompts, completions)):
        logp = by_hand(llm, p, c, s).log_softmax(-1)[len(p) - 1 : -1]
        assert c == logp.argmax(-1).tolist()
        torch.testing.assert_close(logps[i], logp.max(-1).values, rtol=0, atol=1e-4)

    def interrupt(module, args, h):
        if h.shape[1] == 1:  # an answer is being decoded
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks([(model.decoder_layers(llm)[0], interrupt)]):
        model.sample(llm, prompts, 1, 6, [], temperature=0)
    with (
        pytest.raises(AssertionError, match="@answer works in model.sample and model.read"),
        model.steer(llm, {"1@answer": s}),
    ):
        logits(llm, [5, 6, 7])


@pytest.mark.parametrize("o_proj", ["self_attn.o_proj", "attention"])  # two names for one module
@pytest.mark.parametrize("where", ["", "@answer"])
def test_any_place_is_sampled_scored_and_saved_alike(prompts, tmp_path, where, o_proj):
    """A vector after a q_proj wider than the stream and a LoRA on o_proj, against changed weights."""
    llm, changed = (random_llm("qwen3", head_dim=12) for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    s, A, B = (torch.randn(shape, generator=draw) for shape in ((48,), (2, 48), (32, 2)))
    names = "1.self_attn.q_proj", f"2.{o_proj}.lora_A", f"2.{o_proj}.lora_B"
    vectors = {name + where: x for name, x in zip(names, (s, A / 6, B))}
    model.save_vectors(tmp_path / "v.safetensors", vectors, llm, "some/model", step=5)
    got, meta = model.load_vectors(tmp_path / "v.safetensors", llm.config, "some/model")
    assert set(got) == set(vectors) and all(torch.equal(got[place], vectors[place]) for place in got)
    assert meta["site"] == "lora, self_attn.q_proj"
    sizes = model.residual_rms(llm, prompts, list(vectors))
    assert len({round(size, 3) for size in sizes.values()}) == 3 and min(sizes.values()) > 0
    with model.steer(llm, got):
        completions, _ = model.sample(llm, prompts, 1, 6, [], temperature=0)
        logps, _ = model.token_logps(llm, prompts, completions)
        states, before = model.read(llm, prompts, completions)
    best = model.logits(llm, states[before]).log_softmax(-1)
    assert sum(completions, []) == best.argmax(-1).tolist()  # what was sampled is the most likely as it is read
    torch.testing.assert_close(logps.flatten(), best.max(-1).values, rtol=0, atol=1e-4)
    assert completions != model.sample(llm, prompts, 1, 6, [], temperature=0)[0]
    changed.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(s)
    changed.model.layers[2].self_attn.o_proj.weight += B @ A / 6
    want, _ = model.token_logps(changed, prompts, completions)
    assert torch.allclose(logps, want, rtol=0, atol=1e-4) == (where == "")  # "@answer" leaves the prompt as it is


def test_the_engine_gets_a_lora_of_a_lower_rank_than_it_has_room_for():
    engine, sent = object.__new__(VLLM), {}
    engine.shapes = {"end": [3, 4], "attention": [3, 4], "lora_A": [3, 2, 5], "lora_B": [3, 4, 2]}
    engine._change = lambda method, args: sent.update(args[0])
    A, B, s = torch.arange(1.0, 6)[None], torch.arange(1.0, 5)[:, None], torch.arange(2.0, 6)
    engine.push(model.engine_tensors({"1.lora_A": A, "1.lora_B": B, 2: s, "2.mlp.down_proj": s}))
    got = {site: torch.frombuffer(bytearray(raw), dtype=torch.float32) for site, raw in sent.items()}
    got = {site: x.view(engine.shapes[site]) for site, x in got.items()}
    assert torch.equal(got["lora_B"][1] @ got["lora_A"][1], B @ A) and torch.equal(got["end"][2], 2 * s)
    assert not got["lora_A"][1, 1].any() and not got["end"][:2].any() and not got["attention"].any()


def test_sites_whose_output_is_no_plain_tensor_are_refused(qwen2):
    for site in ("self_attn", "mlp.act_fn"):
        with pytest.raises(SystemExit, match=f"after a linear module, a layer norm or the mlp; {site} is none"):
            model.site_module(qwen2, f"1.{site}")


def test_vllm_takes_only_what_it_can_hold(monkeypatch):
    monkeypatch.setattr(model, "find_spec", lambda name: name == "vllm")

    def samples_with(sampler, places, device="cuda:0", architecture="Qwen2ForCausalLM"):
        config = SimpleNamespace(architectures=[architecture], max_position_embeddings=9)
        how = dict(sampler=sampler, holds={place: torch.zeros(1) for place in places}, device=device)
        return subject_of(SimpleNamespace(config=config), None, **how).samples_with

    held = [27, "3.attention", "3.self_attn.o_proj", "2.mlp.down_proj", "2.lora_A", "2.lora_B"]
    assert samples_with("auto", held) == samples_with("vllm", held) == "vllm"
    assert samples_with("auto", held, device="cpu") == samples_with("hf", ["27@answer"]) == "hf"
    assert samples_with("auto", held, architecture="Gemma2ForCausalLM") == "hf"
    for place in ("27@answer", "2.lora_A@answer", "3.input-norm", "3.self_attn.q_proj", "3.self_attn.o_proj.lora_A"):
        assert samples_with("auto", [27, place]) == "hf"
        with pytest.raises(
            SystemExit, match=f"--sampler vllm: a vector at {place} is no bias.*; use --sampler hf"
        ) as error:
            samples_with("vllm", [27, place])
        assert "\n" not in str(error.value)


def test_vector_stays_float32_in_a_bfloat16_model(prompts):
    llm = random_llm().to(torch.bfloat16)
    s = torch.full((32,), 0.1, requires_grad=True)
    with model.steer(llm, {1: s}):
        out = logits(llm, prompts[0])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert s.dtype == s.grad.dtype == torch.float32 and s.grad.abs().sum() > 0


def test_residual_rms(qwen2, prompts):
    kept = []
    handle = qwen2.model.layers[1].register_forward_hook(lambda module, args, output: kept.append(output))
    for ids in prompts:
        logits(qwen2, ids)
    handle.remove()
    sizes = sorted((h[0, t] ** 2).mean().sqrt().item() for h in kept for t in range(h.shape[1]))
    assert len(sizes) == 16
    got = model.residual_rms(qwen2, prompts, [0, 1])
    assert got[1] == pytest.approx(sizes[7], rel=1e-5)  # torch's median of an even number: the lower middle
    assert got[0] != pytest.approx(got[1], rel=1e-3)


# --------------------------------------------------------------------------------------------------------- the sampler


def test_greedy_equals_generate_token_for_token(llm, prompts):
    vectors = {1: vector(size=0.5)}
    with model.steer(llm, vectors):
        got, ended = model.sample(llm, prompts, 2, 20, STOP, temperature=0)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = llm.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )[:, width:].tolist()
    assert len({len(c) for c in got}) > 1 or llm.config.model_type != "qwen2", (
        "lengths should vary for this test to bite"
    )
    for i, want in enumerate(out):
        end = next((t + 1 for t, token in enumerate(want) if token in STOP), 20)
        assert got[2 * i] == got[2 * i + 1] == want[:end]
        assert ended[2 * i] == (want[end - 1] in STOP)


def test_greedy_equals_full_forwards_without_a_cache(llm, prompts):
    got, _ = model.sample(llm, prompts, 1, 12, [], temperature=0)
    for p, c in zip(prompts, got):
        ids = list(p)
        for token in c:
            assert logits(llm, ids)[-1].argmax() == token
            ids.append(token)


def test_rows_that_leave_the_batch_change_no_other_row(qwen2, prompts):
    """16 rows with many stop tokens, against every prompt alone: caches, masks and positions stay together."""
    draw = torch.Generator().manual_seed(2)
    many = [torch.randint(3, 61, (n,), generator=draw).tolist() for n in torch.randint(2, 12, (16,), generator=draw)]
    together, ended = model.sample(qwen2, many, 1, 30, STOP, temperature=0)
    assert len({len(c) for c in together}) >= 4
    for p, c, e in zip(many, together, ended):
        alone, e_alone = model.sample(qwen2, [p], 1, 30, STOP, temperature=0)
        assert alone == [c] and e_alone == [e]
    assert model.sample(qwen2, many, 1, 30, STOP, temperature=0, max_rows=5)[0] == together


def test_samples_follow_the_softmax(qwen2, prompts):
    """Frequencies of the first token against probabilities worked out by a full forward, at T = 2."""
    k = 4000
    got, _ = model.sample(qwen2, prompts[:1], k, 1, [], temperature=2.0, max_rows=k)
    counts = torch.tensor([c[0] for c in got]).bincount(minlength=61)
    p = (logits(qwen2, prompts[0])[-1] / 2.0).softmax(-1)
    spread = (p * (1 - p) * k).sqrt()
    assert ((counts - k * p).abs() < 5 * spread + 1).all()
    assert (p > 0.05).sum() >= 2  # not one token only: the bound above would say little


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_whole_answers_follow_their_exact_probabilities(family):
    """
    Every answer of at most three tokens, of a steered model, at a temperature: chi2 of 6,000 samples against the
    products of probabilities from plain forward passes without a cache. Rows end at different times.
    """
    llm = random_llm(family, vocab_size=5, initializer_range=0.2)
    vectors, prompt, T, stop = {1: torch.linspace(-0.5, 0.5, 32)}, [1, 3, 4, 3], 0.8, [2]
    expected = {}
    with model.steer(llm, vectors), torch.no_grad():

        def extend(answer, p):
            if len(answer) == 3 or answer[-1:] == stop:
                expected[tuple(answer)] = p
                return
            chances = (llm(torch.tensor([prompt + answer])).logits[0, -1].double() / T).softmax(-1)
            for token, chance in enumerate(chances.tolist()):
                extend([*answer, token], p * chance)

        extend([], 1.0)
        completions, _ = model.sample(llm, [prompt, [3, 1]], 6000, 3, stop, T, seed=[7, 8], max_rows=20_000)
    assert sum(expected.values()) == pytest.approx(1) and len(expected) == 1 + 4 + 16 * 5
    found = Counter(map(tuple, completions[:6000]))
    chi2 = sum((found[answer] - 6000 * p) ** 2 / (6000 * p) for answer, p in expected.items())
    n = len(expected) - 1  # Wilson and Hilferty: the cube root of chi2 / n is about normal
    z = ((chi2 / n) ** (1 / 3) - (1 - 2 / (9 * n))) / (2 / (9 * n)) ** 0.5
    assert abs(z) < 3.5 and max(found.values()) < 3000, (chi2, n)


def test_samples_differ_between_rows_and_seeds_and_repeat_with_the_seed(qwen2, prompts):
    a, _ = model.sample(qwen2, prompts, 4, 10, [], seed=1)
    assert a == model.sample(qwen2, prompts, 4, 10, [], seed=1)[0]
    assert a != model.sample(qwen2, prompts, 4, 10, [], seed=2)[0]
    assert a[0] != a[1] and len({tuple(c) for c in a}) > 8


def test_samples_depend_on_the_prompt_and_its_seed_alone(qwen2, prompts):
    """Whatever is sampled beside it: other prompts, fewer rows at once, a longer limit."""
    many = [*prompts, *prompts]
    together, ended = model.sample(qwen2, many, 4, 20, STOP, seed=5)
    assert model.sample(qwen2, many, 4, 20, STOP, seed=5, max_rows=8) == (together, ended)
    seeds = model.prompt_seeds(5, [4, 1])
    assert model.sample(qwen2, [many[4], many[1]], 4, 20, STOP, seed=seeds)[0] == together[16:20] + together[4:8]
    shorter, _ = model.sample(qwen2, many, 4, 4, STOP, seed=5)
    assert shorter == [c[:4] for c in together] and shorter != together
    assert len(set(model.prompt_seeds(0, range(999)) + model.prompt_seeds(1, range(999)))) == 2 * 999


def test_every_prompt_has_its_own_limit(qwen2, prompts):
    """Rows that reach their limit are truncated, and leave the batch without harm to the others."""
    limits = [3, 20, 9]
    got, ended = model.sample(qwen2, prompts, 4, limits, STOP, seed=5)
    free, _ = model.sample(qwen2, prompts, 4, 20, STOP, seed=5)
    for i, (c, e) in enumerate(zip(got, ended)):
        assert c == free[i][: limits[i // 4]] and e == (c[-1] in STOP)
    assert max(map(len, got[:4])) == 3 and not all(ended) and any(ended)


def test_pick_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for u, token in [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (0.9999999, 2)]:
        assert model.pick(logits, 1.0, torch.tensor([u])).tolist() == [token]
    hot = (logits / 2).softmax(-1)[0]  # at T = 2
    assert model.pick(logits, 2.0, hot[:1] - 1e-3).tolist() == [0] and model.pick(
        logits, 2.0, hot[:1] + 1e-3
    ).tolist() == [1]
    never = torch.tensor([[-1e9, 0.0, -1e9]])
    assert model.pick(never.repeat(2, 1), 1.0, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 1]


def test_pick_draws_every_token_as_often_as_it_should():
    """
    Over 152k tokens in bfloat16, against a float64 softmax: a number in a token's part of [0, 1) gives that token.

    Its edges are those of the exact sums within 1e-7, so the total variation is at most 1e-7 a token that is drawn.
    """
    x = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0)).bfloat16()
    up_to = (x.double() / 0.9).softmax(-1).cumsum(-1)[0]
    tokens = torch.arange(1, 151_936, 97)
    tokens = tokens[(up_to[tokens] - up_to[tokens - 1]) > 1e-6]
    low, high = up_to[tokens - 1], up_to[tokens]
    assert len(tokens) > 1000
    for edge in (low + 1e-7, high - 1e-7):
        assert torch.equal(model.pick(x.expand(len(edge), -1), 0.9, edge), tokens)
    rough = torch.searchsorted((x.float() / 0.9).softmax(-1).cumsum(-1)[0], ((low + high) / 2).float(), right=True)
    assert (rough != tokens).float().mean() > 0.01  # what float32 sums and numbers would give


def test_uniform_numbers_have_48_bits_and_begin_with_those_of_float32():
    found = model.uniform(7, 5, 4000)
    assert torch.equal((found * 2**24).floor(), torch.rand(5, 4000, generator=torch.Generator().manual_seed(7)) * 2**24)
    rest = found * 2**24 % 1
    assert 0 <= rest.min() and rest.max() < 1 and rest.mean().item() == pytest.approx(0.5, abs=0.01)
    assert len(found.unique()) == found.numel() and abs(torch.corrcoef(torch.stack([found[0], rest[0]]))[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_is_not_copied_for_every_prompt(dtype):
    """The bytes of the first pass at 1 and at 48 prompts, over 152k tokens: the head would be most of them."""
    llm = random_llm(vocab_size=151_936).to(dtype)
    head, found = llm.get_output_embeddings().weight.nbytes, {}
    for n in (1, 48):
        with torch.profiler.profile(profile_memory=True) as profile:
            model.sample(llm, [[3, 4, 5]] * n, 1, 1, [], temperature=0)
        found[n] = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert found[48] - found[1] < 4 * 48 * 151_936 * dtype.itemsize < 48 * head / 2


def test_importing_changes_no_other_model(prompts):
    """The attention has a name of its own, and a model has it while it samples."""
    seen, llm = set(), random_llm()
    look = [(llm.model.layers[1], lambda *args: seen.add(llm.config._attn_implementation))]
    other = AttentionInterface()["sdpa"]
    with model.hooks(look):
        model.sample(llm, prompts, 2, 3, STOP)
    assert seen == {"sdpa", model.fast.ATTENTION} and llm.config._attn_implementation == "sdpa"
    assert other is AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_dtype_is_the_checkpoints_own_where_the_processor_multiplies_it(monkeypatch):
    own = {dtype: Qwen2Config(dtype=dtype) for dtype in ("float32", "bfloat16", "float16", None)}
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **how: zeros(*shape, **how))  # all are there
    for there, want in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"avx2": True, "avx512_bf16": there})
        assert loading.resolve("cpu", "auto", own["bfloat16"]) == ("cpu", want)
        assert {loading.resolve("cpu", "auto", own[name])[1] for name in ("float32", "float16", None)} == {"float32"}
        assert loading.resolve("cuda", "auto", own["float32"]) == ("cuda", "bfloat16")
        assert loading.resolve("cpu", "float32", own["bfloat16"]) == ("cpu", "float32")
    assert model.load("tiny", "cpu")[0].dtype == torch.float32  # as its checkpoint


def test_stop_token_is_kept_and_truncation_is_told(qwen2, prompts):
    completions, ended = model.sample(qwen2, prompts, 16, 6, STOP, seed=0)
    assert any(ended) and not all(ended)
    for c, e in zip(completions, ended):
        assert e == (c[-1] in STOP) and not any(token in STOP for token in c[:-1])
        assert len(c) == 6 or e


# ---------------------------------------------------------------------------------------------------- token log-probs


def test_token_logps_equal_a_full_forward(llm, prompts):
    completions = [[5, 6, 7, 8], [9, 2], [30, 31, 32]]
    got, mask = model.token_logps(llm, prompts, completions, temperature=0.7, chunk=2)
    assert got.shape == mask.shape == (3, 4) and mask.sum(1).tolist() == [4, 2, 3]
    assert (got[~mask] == 0).all()
    for i, (p, c) in enumerate(zip(prompts, completions)):
        logp = (logits(llm, p + c) / 0.7).log_softmax(-1)
        for t, token in enumerate(c):  # the logits before a token score it
            assert got[i, t].item() == pytest.approx(logp[len(p) + t - 1, token].item(), abs=1e-4)


def test_token_logps_are_those_of_the_sampler(qwen2, prompts):
    """Greedy tokens are the most likely ones: their log-prob is the maximum, also in a steered model."""
    with model.steer(qwen2, {0: vector()}):
        completions, _ = model.sample(qwen2, prompts, 1, 8, [], temperature=0)
        logps, _ = model.token_logps(qwen2, prompts, completions)
        for i, (p, c) in enumerate(zip(prompts, completions)):
            best = logits(qwen2, p + c).log_softmax(-1).max(-1).values[len(p) - 1 : -1]
            torch.testing.assert_close(logps[i], best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # gemma2 caps its logits
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_gradient_of_the_head_is_autograds(family, dtype, close):
    """Against whole logits. In bfloat16 the gradient of every logit is rounded to 8 bits in both, the sum again."""
    llm = random_llm(family).to(dtype)
    h = torch.randn(70, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, weights = torch.arange(70) % 61, torch.linspace(-1, 1, 70)
    found = []
    for ours in (True, False):
        x = h.clone().requires_grad_()
        if ours:
            logps = model.fast.ChosenLogps.apply(x, y, lambda x: model.logits(llm, x, dtype=None), 0.7)
        else:
            logps = (model.logits(llm, x) / 0.7).log_softmax(-1)[torch.arange(70), y]
        (weights * logps).sum().backward()
        found.append((logps.detach(), x.grad.float()))
    (got, got_grad), (want, want_grad) = found
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)
    assert (got_grad - want_grad).norm() < close * want_grad.norm() and want_grad.norm() > 1


def test_padding_and_chunks_change_nothing(llm, prompts):
    completions = [[5, 6, 7, 8], [9, 2], [30, 31, 32]]
    together, _ = model.token_logps(llm, prompts, completions)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        alone, _ = model.token_logps(llm, [p], [c], chunk=1)
        torch.testing.assert_close(together[i, : len(c)], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_of_the_vector(prompts, layer):
    """Central difference along the gradient. HF's norms are fp32 even in a double model: step 1e-2, rtol 1e-3."""
    llm, eps = random_llm().double(), 1e-2
    completions = [[5, 6, 7, 8], [9, 2], [30, 31, 32]]
    v = vector().double().requires_grad_()

    def f(v):
        with model.steer(llm, {layer: v}):
            logps, mask = model.token_logps(llm, prompts, completions, temperature=0.7, chunk=2)
            return (logps * torch.tensor([[1.0], [-2.0], [0.5]])).sum()

    (grad,) = torch.autograd.grad(f(v), v)
    assert grad.norm() > 0.1
    u = grad / grad.norm()
    with torch.no_grad():
        difference = (f(v + eps * u) - f(v - eps * u)) / (2 * eps)
    torch.testing.assert_close((grad @ u).float(), difference.float(), rtol=1e-3, atol=0)


def test_only_the_vectors_have_gradients_and_nothing_below_them(qwen2, prompts):
    s, needs = torch.zeros(32, requires_grad=True), {}
    handles = [
        block.register_forward_hook(lambda module, args, output, i=i: needs.update({i: output.requires_grad}))
        for i, block in enumerate(qwen2.model.layers)
    ]
    with model.steer(qwen2, {1: s}):
        logps, _ = model.token_logps(qwen2, prompts, [[5], [6], [7]])
    logps.sum().backward()
    for handle in handles:
        handle.remove()
    assert needs == {0: False, 1: True, 2: True}  # layer 0 is not part of the graph at all
    assert s.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in qwen2.parameters())


def test_inputs_stay_as_they_are(qwen2, prompts):
    completions, s = [[5, 6], [7], [8, 9, 10]], vector()
    before = json.dumps([prompts, completions]), s.clone()
    with model.steer(qwen2, {1: s}):
        model.token_logps(qwen2, prompts, completions)
        model.sample(qwen2, prompts, 2, 5, STOP)
    assert (json.dumps([prompts, completions]), s.tolist()) == (before[0], before[1].tolist())


# --------------------------------------------------------------------------------------------------------------- files


def test_vectors_survive_the_file_bit_for_bit(qwen2, tmp_path):
    vectors, file = {0: vector(1), 2: vector(2).requires_grad_()}, tmp_path / "vectors.safetensors"
    model.save_vectors(file, vectors, qwen2, "some/model", step=5)
    got, meta = model.load_vectors(file, qwen2.config, "some/model")
    of_the_run, _ = model.load_vectors(tmp_path, qwen2.config)
    assert all(torch.equal(of_the_run[layer], vectors[layer]) for layer in vectors)
    assert list(got) == [0, 2] and all(torch.equal(got[layer], vectors[layer]) for layer in got)
    numbers = {"width": "32", "num_layers": "3", "step": "5", "layers": "0, 2"}
    says = {"operation": "add", "positions": "all", "site": "end of layer", "model_checksum": "unknown"}
    assert meta.pop("layer_numbers").startswith("0-based") and meta == numbers | says | {"model": "some/model"}
    assert not list(tmp_path.glob("*.tmp"))


def test_sites_and_lora_survive_the_file(qwen2, tmp_path):
    vectors = {"1.attention": vector(1), "2.lora_A": torch.randn(4, 40), "2.lora_B": torch.randn(32, 4), 0: vector(2)}
    model.save_vectors(tmp_path / "v.safetensors", vectors, qwen2, "some/model", step=5)
    got, meta = model.load_vectors(tmp_path / "v.safetensors", qwen2.config)
    assert set(got) == set(vectors) and all(torch.equal(got[place], vectors[place]) for place in got)
    assert meta["site"] == "attention, end of layer, lora"
    for name, shape in {"1.attention": (33,), "1.lora_A": (4, 32), "1.lora_B": (4, 32), "x": (32,)}.items():
        save_file({f"layers.{name}": torch.zeros(shape)}, tmp_path / "bad", meta)
        with pytest.raises(SystemExit, match=f"layers.{name} of shape .* does not fit"):
            model.load_vectors(tmp_path / "bad", qwen2.config)


def test_vectors_of_another_model_are_refused(qwen2, tmp_path):
    path = tmp_path / "v.safetensors"
    model.save_vectors(path, {2: vector()}, qwen2, "one", step=1)
    with pytest.raises(SystemExit, match="trained for the model 'one', not for 'two'"):
        model.load_vectors(path, qwen2.config, "two")
    assert list(model.load_vectors(path, qwen2.config)[0]) == [2]  # without a name: transfer
    with pytest.raises(SystemExit, match="width 32 and 3 layers; this one has width 32 and 2 layers"):
        model.load_vectors(path, random_llm(num_hidden_layers=2).config)
    with pytest.raises(SystemExit, match="width 32 and 3 layers; this one has width 48 and 3 layers"):
        model.load_vectors(path, random_llm(hidden_size=48).config)
    with pytest.raises(SystemExit, match="train some first"):
        model.load_vectors(tmp_path / "missing.safetensors", qwen2.config)
    (tmp_path / "text").write_text("not a tensor file")
    with pytest.raises(SystemExit, match="not a safetensors file"):
        model.load_vectors(tmp_path / "text", qwen2.config)
    save_file({"layers.0": torch.zeros(32)}, tmp_path / "plain")
    with pytest.raises(SystemExit, match="metadata lacks model, width"):
        model.load_vectors(tmp_path / "plain", qwen2.config)
    meta = {"model": "one", "width": "32", "num_layers": "3", "site": "end of layer", "step": "1"}
    save_file({"layers.3": torch.zeros(32)}, tmp_path / "layer", meta)
    with pytest.raises(SystemExit, match=r"layers.3 of shape \(32,\) does not fit a model of 3 layers"):
        model.load_vectors(tmp_path / "layer", qwen2.config)


def test_a_model_that_cannot_be_had_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="cannot load the model 'nobody/nothing'.*hub id") as error:
        model.load("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="a model folder holds config.json"):
        model.load(str(tmp_path))
    for device in ("no-such", "meta"):
        with pytest.raises(SystemExit, match=f"--device {device}"):
            model.load("tiny", device=device)
    with pytest.raises(SystemExit, match="--dtype wants"):
        model.load("tiny", dtype="float8")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}\n", r'line 1: wanted \{"problem"'),
        ('{"problem": "a", "answer": "1"}\n{', "line 2: not JSON"),
        ('{"problem": "a", "answer": {}}', "line 1: an answer is a text, a number or a list"),
        ('{"problem": "a", "answer": []}', "line 1: an answer is a text, a number or a list"),
        ('{"problem": 1, "answer": "1"}', "line 1: wanted"),
        ("", "is empty"),
    ],
)
def test_bad_problem_files_name_the_line(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        problems_of(tmp_path / "p.jsonl")


def test_answers_may_be_texts_numbers_or_lists(tmp_path):
    rows = [{"problem": "a", "answer": answer} for answer in ("3/4", 34, 2.5, ["1"], ["1", 2])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = [row["answer"] for row in problems_of(tmp_path / "p.jsonl").rows]
    assert got == ["3/4", "34", "2.5", "1", ["1", "2"]]


def test_load_freezes():
    llm, _ = model.load("tiny", device="cpu")
    assert not llm.training and not any(p.requires_grad for p in llm.parameters()) and llm.dtype == torch.float32
    assert model.load("tiny", device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_prompts_end_where_the_answer_begins(tokenizer):
    ids = model.prompt_ids(tokenizer, "1+1?")
    text = tokenizer.decode(ids)
    assert text.startswith(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert text.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert "system\nBe brief.<|im_end|>" in tokenizer.decode(model.prompt_ids(tokenizer, "1+1?", "Be brief."))


def test_templates_are_the_papers(tokenizer):
    """P4 App. K, typed out."""
    qwen = (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    r1 = (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: 1+1?\nAssistant: <think>"
    )
    for template, text in (("qwen-math", qwen), ("native", qwen), (None, qwen), ("r1", r1)):
        assert tokenizer.decode(model.prompt_ids(tokenizer, "1+1?", template=template)) == text, template
    assert model.prompt_ids(tokenizer, "1+1?")[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    short = tokenizer.decode(model.prompt_ids(tokenizer, "1+1?", system="", template="qwen-math"))
    assert short == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(SystemExit, match="--template wants native, qwen-math or r1, got 'alpaca'"):
        model.prompt_ids(tokenizer, "1+1?", template="alpaca")


@pytest.fixture
def llama_tokenizer():
    """One that puts a BOS before every text, and whose chat template writes it too, as Llama 3's."""
    words = Tokenizer(
        WordLevel({"<s>": 0, "?": 1, "</s>": 2, "one": 3, "Please": 4, "user:": 5, "bot:": 6}, unk_token="?")
    )
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")
    found.chat_template = "<s> {% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}bot:"
    return found


def test_prompts_have_one_bos(llama_tokenizer):
    for template in ("native", "qwen-math", "r1"):
        ids = model.prompt_ids(llama_tokenizer, "one", template=template)
        assert ids[0] == 0 and ids.count(0) == 1, template
    assert 5 in model.prompt_ids(llama_tokenizer, "one")  # the chat template is the default where there is one
    llama_tokenizer.chat_template = None
    assert model.prompt_ids(llama_tokenizer, "one") == model.prompt_ids(llama_tokenizer, "one", template="r1")
    with pytest.raises(SystemExit, match="--template native: this model's tokenizer has no chat template"):
        model.prompt_ids(llama_tokenizer, "one", template="native")


def test_a_bos_that_opens_every_turn(llama_tokenizer):
    """SmolLM2's BOS is <|im_start|>: it comes again and again, but only once in front."""
    llama_tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['role'] }}: {{ m['content'] }} {% endfor %}<s> bot:"
    )
    assert model.prompt_ids(llama_tokenizer, "one", "Please") == [0, 1, 4, 0, 5, 3, 0, 6]
    llama_tokenizer.chat_template = "<s> <s> user: {{ messages[-1]['content'] }} bot:"
    with pytest.raises(AssertionError, match="puts two BOS tokens in front"):
        model.prompt_ids(llama_tokenizer, "one")
    llama_tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})  # qwen-math begins with it: no <s> goes in front
    assert model.prompt_ids(llama_tokenizer, "one", template="qwen-math")[0] == llama_tokenizer.bos_token_id != 0


def test_a_template_without_system_messages_gets_the_instruction_with_the_problem(llama_tokenizer):
    """Gemma's raises an error for a system message."""
    llama_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<s> user: {{ messages[0]['content'] }} bot:"
    )
    assert model.prompt_ids(llama_tokenizer, "one", "Please") == [0, 5, 4, 3, 6]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    for text in ("one", "two"):
        with model.written(tmp_path / "new" / "file") as new:
            new.write_text(text)
        assert (tmp_path / "new" / "file").read_text() == text
    with pytest.raises(KeyError), model.written(tmp_path / "new" / "file") as new:
        new.write_text("half")
        raise KeyError
    assert (tmp_path / "new" / "file").read_text() == "two"
    for name in ("a", "b"):
        with model.written(tmp_path / "folder") as new:
            new.mkdir()
            (new / name).touch()
    assert [f.name for f in (tmp_path / "folder").iterdir()] == ["b"]


def test_rollouts_put_the_prefix_first(tokenizer):
    llm, _ = model.load("tiny", device="cpu")
    problem = json.loads((ROOT / "data/tiny/test.jsonl").read_text().splitlines()[0])["problem"]
    rolled = rollouts(llm, tokenizer, {}, [problem, problem], 2, 5, prefix="To")
    assert len(rolled.prompts) == len(rolled.completions) == len(rolled.ended) == len(rolled.texts) == 4
    forced = tokenizer("To").input_ids
    assert len(forced) == 1 and rolled.prompts[0] == model.prompt_ids(tokenizer, problem) + forced
    for ids, text in zip(rolled.completions, rolled.texts):
        assert text == "To" + tokenizer.decode(ids, skip_special_tokens=True)
