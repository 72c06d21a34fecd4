"""The predictor and the Y-Encoder written with torch's layers, for predictor_step.py.

Same mathematics, parameters and batches as ours.  Padding is not packed away, as we do, but given Δ = 0, so that the
state passes it by: every product then runs over a whole batch, which is what torch is best at.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.predictor_step import read_case

PAD = 256
QUERY, VISUAL, TOOL, READ = range(4)
CHUNK = 64


class Mixer(nn.Module):
    """Mamba-3, one input and one group, pairs rotated, each head's output normalised."""

    def __init__(self, config):
        super().__init__()
        d, self.size, self.width = config["d_model"], config["d_state"], config["headdim"]
        self.inner = d * config["expand"]
        self.heads, self.turns = self.inner // self.width, self.size // 2 // 2
        self.parts = [self.inner, self.inner, self.size, self.size, self.heads, self.heads, self.heads, self.turns]
        self.in_proj = nn.Linear(d, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.B_bias = nn.Parameter(torch.zeros(self.heads, 1, self.size))
        self.C_bias = nn.Parameter(torch.zeros(self.heads, 1, self.size))
        self.B_norm, self.C_norm = nn.RMSNorm(self.size, 1e-5), nn.RMSNorm(self.size, 1e-5)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.width, 1e-5)
        self.norm.weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, d, bias=False)

    def forward(self, x, state, padding):
        batch, length, _ = x.shape
        z, v, k, q, step, forget, trap, angle = self.in_proj(x).split(self.parts, dim=-1)
        v = v.reshape(batch, length, self.heads, self.width)
        dt = F.softplus(step + self.dt_bias)
        if padding is not None:
            dt = dt * padding.real
        rate = torch.where(forget >= 0, forget + 1, 1 / (1 - forget.clamp(max=0)))
        log_decay = -rate.clamp(min=1e-4) * dt
        gamma = torch.sigmoid(trap) * dt
        behind = dt - gamma
        if padding is None:
            gain, first = gamma + F.pad(behind[:, 1:], (0, 0, 0, 1)), behind[:, 0]
        else:  # the token before a real one may lie before some padding
            after = behind.gather(1, padding.next.expand(-1, -1, self.heads)) * padding.has_next
            gain = gamma + after
            first = behind.gather(1, padding.first.expand(-1, -1, self.heads))[:, 0]
        theta = (math.pi * torch.tanh(angle)[:, :, None] * dt[..., None]).cumsum(1)
        if state is not None:
            theta = theta + state[0][:, None]
        cosine, sine = torch.cos(theta), torch.sin(theta)
        q = self.rotate(self.C_norm(q)[:, :, None] + self.C_bias[:, 0], cosine, sine)
        k = self.rotate(self.B_norm(k)[:, :, None] + self.B_bias[:, 0], cosine, sine)
        h = None
        if state is not None:
            h = state[1] + (first[..., None] * state[2])[..., None] * state[3][:, :, None]
        y, h = self.scan(q, k, v, log_decay, gain, gamma, h)
        if padding is None:
            last = theta[:, -1], k[:, -1], v[:, -1]
        else:
            last = [part[padding.rows, padding.last] for part in (theta, k, v)]
        y = self.norm_heads(y + self.D[:, None] * v).reshape(batch, length, self.inner)
        return self.out_proj(y * F.silu(z)), (last[0], h, last[1], last[2])

    def norm_heads(self, y):
        weight = self.norm.weight.view(self.heads, self.width)
        return F.rms_norm(y, (self.width,), eps=1e-5) * weight

    def rotate(self, x, cosine, sine):
        pairs = x[..., : 2 * self.turns].unflatten(-1, (self.turns, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)
        return torch.cat([turned, x[..., 2 * self.turns :]], -1)

    def scan(self, q, k, v, log_decay, gain, gamma, h):
        """q, k (B, L, H, N), v (B, L, H, P), weights (B, L, H), h (B, H, N, P) or None → y, h."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        log_decay, gain, gamma = (x.transpose(1, 2) for x in (log_decay, gain, gamma))
        pieces, length = [], q.shape[2]
        for start in range(0, length, CHUNK):
            at = slice(start, min(start + CHUNK, length))
            qs, ks, vs = q[:, :, at], k[:, :, at], v[:, :, at]
            along = log_decay[:, :, at].cumsum(-1)
            own, given = gamma[:, :, at, None], gain[:, :, at, None] * vs
            count = along.shape[-1]
            above = torch.ones(count, count, dtype=torch.bool).triu()
            decay = (along[..., :, None] - along[..., None, :]).masked_fill(above, -torch.inf).exp()
            y = (qs @ ks.transpose(2, 3) * decay) @ given + (qs * ks).sum(-1, keepdim=True) * own * vs
            if h is not None:
                y = y + along.exp()[..., None] * (qs @ h)
            to_end = (along[..., -1:] - along).exp()[..., None]
            after = ks.transpose(2, 3) @ (to_end * given)
            h = after if h is None else along[..., -1, None, None].exp() * h + after
            pieces.append(y)
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        return y.transpose(1, 2), h


class Padding:
    """What a mask (B, L) means for a scan; made once a batch, before the layers."""

    def __init__(self, mask):
        batch, length = mask.shape
        self.rows = torch.arange(batch)
        self.real = mask[..., None].float()
        places = torch.where(mask, torch.arange(length), length)
        following = places.flip(1).cummin(1).values.flip(1)  # of each place, the first real one from there on
        following = F.pad(following[:, 1:], (0, 1), value=length)
        self.has_next = (mask & (following < length))[..., None].float()
        self.next = following.clamp(max=length - 1)[..., None]
        self.first = places.min(1).values[:, None, None]
        self.last = torch.where(mask, torch.arange(length), -1).max(1).values

    @classmethod
    def of(cls, mask):
        return None if mask.all() else cls(mask)


class Layer(nn.Module):
    def __init__(self, config, gates):
        super().__init__()
        d = config["d_model"]
        self.norm, self.mixer = nn.RMSNorm(d, 1e-5), Mixer(config)
        self.gate = nn.ParameterDict({"weight": torch.zeros(d), "bias": torch.zeros(4, d)}) if gates else None

    def forward(self, h, state=None, padding=None, modality=None):
        z = self.norm(h)
        if self.gate is not None:
            half = torch.sigmoid(z * self.gate["weight"] + self.gate["bias"][modality])
            z = z * (2 * half)
            share = half.detach().mean(2)
            self.opened = share.mean(1) if padding is None else (
                (share * padding.real[..., 0]).sum(1) / padding.real.sum((1, 2)))
        y, state = self.mixer(z, state, padding)
        return h + (y if padding is None else y * padding.real), state

    def regulariser(self):
        return (2 * torch.sigmoid(self.gate["bias"]) - 1).square().mean()


class Predictor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, d = config, config["d_model"]
        words = config["query_dim"]
        self.token_embedding = nn.ParameterDict({"byte": torch.zeros(config["vocab_size"], words),
                                                 "place": torch.zeros(12, words)})
        self.query_proj, self.vision_proj = nn.Linear(config["query_dim"], d), nn.Linear(config["vision_dim"], d)
        self.vision_position = nn.Parameter(torch.zeros(config["n_visual"], d))
        self.register_buffer("vision_mean", torch.zeros(config["vision_dim"]))
        self.register_buffer("vision_whiten", torch.zeros(config["vision_dim"], config["vision_dim"]))
        self.read_proj = nn.Linear(d, d, bias=False)
        self.read_tokens = nn.Parameter(torch.zeros(config["n_read"], d))
        self.layers = nn.ModuleList(Layer(config, True) for _ in range(config["n_layers"]))
        self.final_norm, self.pred_head = nn.RMSNorm(d, 1e-5), nn.Linear(d, config["embed_dim"])

    def query(self, ids, kind=QUERY):
        real = (ids != PAD)[..., None].float()
        words = (F.embedding(ids, self.token_embedding["byte"]) * real * self.token_embedding["place"]).sum(2)
        return self.query_proj(words), ids[:, :, 0] != PAD, torch.full((ids.shape[1],), kind)

    def visual(self, visual):
        white = (visual - self.vision_mean) @ self.vision_whiten
        kept, places = self.config["n_salient"], torch.arange(white.shape[1])
        if 0 < kept < white.shape[1] - 1:
            surprise = white[:, 1:].square().sum(-1)
            chosen = surprise.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(1).values + 1
            places = F.pad(chosen, (1, 0))
            white = white.gather(1, places[..., None].expand(-1, -1, white.shape[2]))
        tokens = self.vision_proj(white) + F.embedding(places, self.vision_position)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), torch.full((tokens.shape[1],), VISUAL)

    def read_segment(self, question):
        words, mask, _ = question
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1).sqrt()
        tokens = self.read_tokens + self.read_proj((words * weight[..., None]).sum(1))[:, None]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), torch.full((tokens.shape[1],), READ)

    def run(self, segments, states=None):
        h, mask = torch.cat([s[0] for s in segments], 1), torch.cat([s[1] for s in segments], 1)
        modality, padding, after = torch.cat([s[2] for s in segments]), Padding.of(mask), []
        for layer, state in zip(self.layers, states or [None] * len(self.layers)):
            h, state = layer(h, state, padding, modality)
            after.append(state)
        pooled = self.final_norm(h[:, -self.config["n_read"] :]).mean(1)
        return F.normalize(self.pred_head(pooled), dim=-1), after

    def forward(self, query, visual, tool):
        segments = [self.query(query), self.visual(visual)]
        if tool is not None:
            segments.append(self.query(tool, TOOL))
        return self.run([*segments, segments[0], self.read_segment(segments[0])])

    def read(self, query, states):
        question = self.query(query)
        return self.run([question, self.read_segment(question)], states)


class TextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config["vocab_size"], config["d_model"])
        self.layers = nn.ModuleList(Layer(config, False) for _ in range(config["n_layers"]))
        self.final_norm = nn.RMSNorm(config["d_model"], 1e-5)
        self.projection = nn.Linear(config["d_model"], config["embed_dim"])

    def forward(self, ids):
        mask = ids != PAD
        h, padding = self.embedding(ids), Padding.of(mask)
        for layer in self.layers:
            h, _ = layer(h, None, padding)
        weight = (mask / mask.sum(1, keepdim=True))[..., None]
        return F.normalize(self.projection((self.final_norm(h) * weight).sum(1)), dim=-1)


class Model(nn.Module):
    def __init__(self, predictor, text):
        super().__init__()
        self.predictor, self.y_encoder = Predictor(predictor), TextEncoder(text)
        self.log_scale = nn.Parameter(torch.zeros(()))


class Torch:
    """The peer of ``predictor_step.Ours``."""

    def __init__(self, path, threads):
        torch.set_num_threads(threads)
        about, weights, ids, batches = read_case(path)
        settings = about["settings"]
        self.model = Model(about["predictor"], about["text"])
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        self.answer_ids = torch.from_numpy(ids)
        self.batches = [([{name: None if x is None else torch.from_numpy(x) for name, x in turn.items()}
                          for turn in turns], torch.from_numpy(target)) for turns, target in batches]
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if decays(name, p)]
        rest = [p for name, p in named if not decays(name, p)]
        groups = [{"params": decayed, "weight_decay": settings["weight_decay"]},
                  {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], fused=True)
        self.clip, self.gate_weight = settings["clip"], settings["gate_weight"]

    def forward(self, batch):
        self.optimizer.zero_grad(set_to_none=True)
        (first, *later), target = batch
        predictor = self.model.predictor
        embedding, states = predictor(first["query"], first["visual"], first["tool"])
        predicted = [embedding]
        opened = torch.stack([layer.opened for layer in predictor.layers]).mean().item()
        for turn in later:
            embedding, states = predictor.read(turn["query"], states)
            predicted.append(embedding)
        predicted = torch.cat(predicted) if later else predicted[0]
        encoded = self.model.y_encoder(self.answer_ids)
        loss = multi_positive(predicted, encoded, target, self.model.log_scale)
        hits = ((predicted.detach() @ encoded.detach().T).argmax(1) == target).float().mean().item()
        penalty = sum(layer.regulariser() for layer in predictor.layers)
        loss = loss + penalty * (self.gate_weight / len(predictor.layers))
        self.metrics = hits, opened
        return loss, loss.item()

    def backward(self, loss):
        loss.backward()

    def update(self):
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.model.log_scale.data.clamp_(0.0, math.log(100.0))

    def gradients(self):
        return {name: p.grad.numpy() for name, p in self.model.named_parameters()}


def multi_positive(p, q, target, log_scale):
    """InfoNCE where equal answers are one target: mean of the rows' and of the present columns' cross-entropy."""
    logits = log_scale.exp() * p @ q.T
    hit = F.one_hot(target, len(q)).to(logits.dtype)
    count = hit.sum(0)
    by_column = (hit / count.clamp(min=1) * logits.log_softmax(0)).sum() / (count > 0).sum()
    return 0.5 * (F.cross_entropy(logits, target) - by_column)


def decays(name, parameter):
    """Which parameters weight decay touches: as ``training.optim.decays``."""
    parts = name.split(".")
    return (parameter.ndim >= 2 and not parts[-1].endswith("bias") and parts[-1] not in ("D", "dt_bias", "log_scale")
            and not any("norm" in part for part in parts))
