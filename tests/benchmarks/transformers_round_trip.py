"""Models and tokenizers there and back: transformers' folders read here, ours read there, the same numbers.

    python tests/benchmarks/transformers_round_trip.py --peer-python PYTHON_WITH_TRANSFORMERS

Random-weight Mamba, Mamba-2 (two groups) and FalconMamba models are saved by transformers (whole, in
shards, as BF16, and as a torch file) and read here: logits of whole sequences, token by token, and greedy
text, with a repetition penalty too.  Then models of ours are saved for transformers and read there.  Last,
what sampling keeps is compared with transformers' logits processors, and the ids of generated texts with
those of the tokenizers package.  Ends with 1 if a difference is larger than rounding explains.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

KINDS = ("mamba", "mamba2", "falcon_mamba")
LENGTH, NEW = 37, 12
WARPERS = [(1.0, None, None, 1.0), (0.7, 20, None, 1.0), (1.3, None, 0.8, 1.0), (0.9, 30, 0.9, 1.4)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with transformers")
    parser.add_argument("--texts", type=int, default=3000, help="generated texts for the tokenizers")
    parser.add_argument("--side", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        step, folder = options.side
        {"make": make, "read": read_ours}[step](Path(folder), options.texts)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _peer(options, "make", folder)
        worst = [compare_folders(folder), compare_sampling(folder), compare_tokenizers(folder)]
        save_ours(folder)
        _peer(options, "read", folder)
        worst.append(compare_ours(folder))
    print("\nAll within rounding." if all(worst) else "\nDIFFERENCES LARGER THAN ROUNDING.")
    return 0 if all(worst) else 1


def _peer(options, step, folder):
    command = [options.peer_python, __file__, "--side", step, str(folder), "--texts", str(options.texts)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr.strip()}\n\nthe peer failed: --peer-python needs torch, transformers "
                         "and tokenizers")  # fmt: skip


# ------------------------------------------------------------------ transformers' side
def make(folder, texts):
    """Everything transformers writes: model folders with results, processed logits, tokenizers with ids."""
    import torch
    import transformers

    for kind in KINDS:
        model = _random_model(transformers, torch, kind)
        ids = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        found = _results(torch, model, ids)
        model.save_pretrained(folder / kind)
        np.savez(folder / kind / "results.npz", **found)
        model.save_pretrained(folder / f"{kind} in shards", max_shard_size="30KB")
        np.savez(folder / f"{kind} in shards" / "results.npz", **found)
        half = _random_model(transformers, torch, kind).to(torch.bfloat16)
        half.save_pretrained(folder / f"{kind} as BF16")
        wide = half.to(torch.float32)
        np.savez(folder / f"{kind} as BF16" / "results.npz", **_results(torch, wide, ids))
        target = folder / f"{kind} as a torch file"
        target.mkdir()
        model.config.save_pretrained(target)
        torch.save(model.state_dict(), target / "pytorch_model.bin")
        np.savez(target / "results.npz", **found)
    _process(torch, transformers, folder)
    _tokenize(folder, texts)


def _random_model(transformers, torch, kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, initializer_range=0.1, pad_token_id=0,
                 eos_token_id=None, bos_token_id=None, conv_kernel=4, expand=2)  # fmt: skip
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(state_size=8, **sizes))
    elif kind == "mamba2":
        # No time_step_limit: the single step there ignores one.
        config = transformers.Mamba2Config(state_size=16, num_heads=8, head_dim=8, n_groups=2, chunk_size=8, **sizes)
        model = transformers.Mamba2ForCausalLM(config)
    else:
        model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(state_size=8, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.02 if name.endswith("dt_bias") else 0.1
            parameter += scale * torch.randn(parameter.shape)
    return model.eval()


def _results(torch, model, ids):
    """Logits whole and token by token, and text: greedy, and with a repetition penalty."""
    with torch.no_grad():
        whole = model(ids).logits
        steps, cache = [], None
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
        text = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        penalized = model.generate(ids, max_new_tokens=NEW, do_sample=False, repetition_penalty=1.3)
        unlike = [model.generate(ids[:1, :n], max_new_tokens=NEW, do_sample=False)[0].numpy() for n in (5, 9)]
    return dict(ids=ids.numpy(), whole=whole.numpy(), steps=torch.cat(steps, 1).numpy(), text=text.numpy(),
                penalized=penalized.numpy(), short=unlike[0], longer=unlike[1])  # fmt: skip


def _process(torch, transformers, folder):
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)) * 3
    seen = torch.randint(0, 200, (4, 30), generator=torch.Generator().manual_seed(3))
    found = {"logits": logits.numpy(), "seen": seen.numpy()}
    for i, (temperature, top_k, top_p, penalty) in enumerate(WARPERS):
        steps = transformers.LogitsProcessorList()
        if penalty != 1:
            steps.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
        steps.append(transformers.TemperatureLogitsWarper(temperature))
        if top_k:
            steps.append(transformers.TopKLogitsWarper(top_k))
        if top_p:
            steps.append(transformers.TopPLogitsWarper(top_p))
        found[f"p{i}"] = steps(seen, logits.clone().double()).softmax(-1).numpy()
    np.savez(folder / "processed.npz", **found)


def _texts(count):
    """Texts with words, numbers, marks, blanks and characters from everywhere."""
    rng, texts = np.random.default_rng(0), []
    alphabets = ["etaoin shrdlu ETAOIN", "0123456789", " \t\n\r\u00a0\u3000\u2028\x85",
                 ".,;:!?'\"()[]{}<>|~`@#$%^&*-_=+/", "áéîõüßÆøłč",
                 "αβγ абв אבג عرب हिन्दी ไทย 漢字 かな 한글", "١٢٣²¾Ⅷ", "😀👩‍👩‍👧🇩🇪", "\u0301\u0308\u200d\ufeff"]
    for _ in range(count):
        parts = []
        for _ in range(rng.integers(0, 12)):
            letters = alphabets[rng.integers(len(alphabets))] if rng.random() < 0.6 else alphabets[0]
            parts.append("".join(letters[i] for i in rng.integers(0, len(letters), rng.integers(1, 9))))
        texts.append("".join(parts))
    return texts + ["<|end|>", "a<|end|> b", "don't I'll we'VE  x", "a  b   c", "  "]


def _tokenize(folder, count):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = {
        "gpt2": level,
        "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "llama3": pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "falcon": pre_tokenizers.Sequence([
            pre_tokenizers.Punctuation("contiguous"), level, pre_tokenizers.Digits(False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]),
    }  # fmt: skip
    texts = _texts(count)
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("a*.py"))]
    for name, cut in cuts.items():
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
        if name == "prefix space":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
        tokenizer.train_from_iterator(sources + texts[: count // 2], trainers.BpeTrainer(
            vocab_size=2000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tokenizer.add_special_tokens(["<|end|>"])
        tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("ETA", single_word=True, lstrip=True)])
        target = folder / f"tokenizer {name}"
        target.mkdir()
        tokenizer.save(str(target / "tokenizer.json"))
        encoded = [tokenizer.encode(text).ids for text in texts]
        decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded]
        (target / "ids.json").write_text(json.dumps([texts, encoded, decoded]), encoding="utf-8")


def read_ours(folder, _):
    """Logits of the folders that we saved."""
    import torch
    import transformers

    for path in sorted(folder.glob("ours *")):
        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        with np.load(path / "ours.npz") as ours:
            found = _results(torch, model, torch.from_numpy(ours["ids"]))
        np.savez(path / "results.npz", **found)


# ------------------------------------------------------------------ our side
def _own_results(model, ids):
    import xuracore as xc

    with xc.no_grad():
        whole, state, steps = model(ids)[0].numpy(), None, []
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state)
            steps.append(logits.numpy())
    short, longer = model.generate([ids[0, :5], ids[0, :9]], NEW, stop=())
    penalized = model.generate(ids, NEW, stop=(), repetition_penalty=1.3)
    return dict(ids=ids, whole=whole, steps=np.concatenate(steps, 1), text=model.generate(ids, NEW, stop=()),
                penalized=penalized, short=short, longer=longer)  # fmt: skip


def _table(title):
    print(f"\n{title}\n\n| model | whole | token by token | largest logit | greedy | penalized | several lengths |")
    print("|---|---:|---:|---:|---|---|---|")


def _compare(name, ours, theirs):
    differences = [np.abs(ours[key] - theirs[key]).max() for key in ("whole", "steps")]
    same = [np.array_equal(ours[key], theirs[key]) for key in ("text", "penalized")]
    same.append(all(np.array_equal(ours[key], theirs[key]) for key in ("short", "longer")))
    largest = np.abs(theirs["whole"]).max()
    words = ["same" if equal else "DIFFERENT" for equal in same]
    print(f"| {name} | {differences[0]:.1e} | {differences[1]:.1e} | {largest:.1f} | {' | '.join(words)} |")
    return max(differences) < 1e-5 * max(1, largest) and all(same)


def compare_folders(folder):
    from xuramamba import LanguageModel

    _table("Saved by transformers, read here (largest difference of logits)")
    good = True
    for kind in KINDS:
        for form in ("", " in shards", " as BF16", " as a torch file"):
            path = folder / f"{kind}{form}"
            theirs = np.load(path / "results.npz")
            good &= _compare(path.name, _own_results(LanguageModel.from_pretrained(path), theirs["ids"]), theirs)
    return good


def save_ours(folder):
    from xuramamba import LanguageModel, LanguageModelConfig

    mixers = {
        "Mamba": ("mamba1", {"d_state": 6, "d_conv": 3, "expand": 3, "dt_rank": 5}),
        "Mamba with biases": ("mamba1", {"bias": True}),
        "Mamba-2": ("mamba2", {"d_state": 16, "headdim": 8, "ngroups": 2}),
        "Mamba-2, 4 groups, biases": ("mamba2", {"d_state": 16, "headdim": 8, "ngroups": 4, "bias": True}),
        "FalconMamba": ("mamba1", {"mixer_rms_eps": 1e-6}),
    }
    rng = np.random.default_rng(5)
    for i, (name, (mixer, fields)) in enumerate(mixers.items()):
        config = LanguageModelConfig(61, 32, 2, mixer, fields, pad_vocab_size_multiple=8, tie_embeddings=i % 2 == 0)
        model = LanguageModel(config, rng=rng)
        for parameter in model.parameters():
            parameter.data += 0.1 * rng.standard_normal(parameter.shape, dtype=np.float32)
        model.save_pretrained(folder / f"ours {name}", format="huggingface")
        # The padding rows of the vocabulary are tokens there, so both sides are asked with all of them open.
        open_model = LanguageModel.from_pretrained(folder / f"ours {name}")
        found = _own_results(open_model, rng.integers(1, 61, (2, LENGTH)))
        np.savez(folder / f"ours {name}" / "ours.npz", **found)


def compare_ours(folder):
    _table("Saved here, read by transformers")
    results = []
    for path in sorted(folder.glob("ours *")):
        name = path.name.removeprefix("ours ")
        results.append(_compare(name, np.load(path / "ours.npz"), np.load(path / "results.npz")))
    return all(results)


def compare_sampling(folder):
    from xuramamba.sampling import filtered_probabilities, penalize_repetition

    found, good = np.load(folder / "processed.npz"), True
    print("\nProbabilities after temperature, top-k, top-p and repetition penalty\n")
    print("| temperature | top-k | top-p | penalty | largest difference | kept |\n|---|---|---|---|---:|---|")
    for i, (temperature, top_k, top_p, penalty) in enumerate(WARPERS):
        logits = found["logits"].astype(np.float64)
        for row, seen in zip(logits, found["seen"]):
            penalize_repetition(row, np.unique(seen), penalty)
        ours = filtered_probabilities(logits, temperature, top_k, top_p)
        difference, same = np.abs(ours - found[f"p{i}"]).max(), ((ours > 0) == (found[f"p{i}"] > 0)).all()
        word = "same" if same else "DIFFERENT"
        print(f"| {temperature} | {top_k} | {top_p} | {penalty} | {difference:.1e} | {word} |")
        good &= difference < 1e-12 and same
    return good


def compare_tokenizers(folder):
    from xuramamba.tokenizer import read_tokenizer

    print("\nIds and text of generated texts, against the tokenizers package\n")
    print("| kind | texts | tokens | texts with other ids | with other text |\n|---|---:|---:|---:|---:|")
    good = True
    for path in sorted(folder.glob("tokenizer *")):
        texts, encoded, decoded = json.loads((path / "ids.json").read_text(encoding="utf-8"))
        tokenizer = read_tokenizer(path / "tokenizer.json")
        other = [text for text, ids in zip(texts, encoded) if tokenizer.encode(text).tolist() != ids]
        unlike = [text for text, ids in zip(decoded, encoded) if tokenizer.decode(np.array(ids, np.int64)) != text]
        tokens = sum(map(len, encoded))
        print(f"| {path.name.removeprefix('tokenizer ')} | {len(texts)} | {tokens} | {len(other)} | {len(unlike)} |")
        for text in other[:3]:
            print(f"  {text!r}: {tokenizer.encode(text).tolist()}, expected {encoded[texts.index(text)]}")
        good &= not other and not unlike
    return good


if __name__ == "__main__":
    sys.exit(main())
