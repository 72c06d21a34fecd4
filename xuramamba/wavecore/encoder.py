"""What goes in and what comes out: the input encoder, the decoder, and the heads for value and world model."""

from xuracore import ops
from xuracore.errors import ShapeError
from xuracore.nn import Parameter, init
from xuramamba.wavecore.parameters import dense, mlp, new_dense, new_mlp, new_norm, norm

IMAGE_WIDTHS = (32, 64, 64)


def new_encoder(rng, c, obs_dim, action_dim):
    """Parameters of :func:`encode`."""
    tree = {}
    if c.obs_type == "image":
        widths = (c.image_channels, *IMAGE_WIDTHS)
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            weight = init.kaiming_normal((outputs, inputs, 3, 3), rng)
            tree[f"conv{i}"] = {"kernel": Parameter(weight), "bias": Parameter(init.zeros(outputs))}
        obs_dim = widths[-1]
    tree["obs"] = new_mlp(rng, obs_dim, 2 * c.d_e, c.d_e, c.use_layer_norm)
    tree["action"] = new_dense(rng, action_dim, c.d_e // 2)
    tree["reward"] = new_dense(rng, 1, c.d_e // 4)
    fused = c.d_e + c.d_e // 2 + c.d_e // 4
    if c.use_object_slot:
        fused += c.d_e
    tree["fuse"] = new_mlp(rng, fused, 2 * c.d_e, c.d_e, c.use_layer_norm)
    if c.use_layer_norm:
        tree["norm"] = new_norm(c.d_e)
    return tree


def new_objects(rng, c):
    """Parameters for object features, which only a model that is given some has."""
    return new_dense(rng, c.object_dim, c.d_e)


def encode(params, config, obs, action, reward, objects=None):
    """e (B, d_e) of obs (B, obs_dim) or images (B, H, W, C), action (B, action_dim) and reward (B, 1).

    objects : (B, K, object_dim), of which each feature's largest value counts; None for no objects.
    """
    if config.obs_type == "image":
        x = ops.transpose(obs, (0, 3, 1, 2))
        for i in range(len(IMAGE_WIDTHS)):
            layer = params[f"conv{i}"]
            x = ops.relu(ops.conv2d(x, layer["kernel"], layer["bias"], stride=2, padding=1))
        obs = ops.mean(x, axis=(2, 3))  # over the picture's height and width
    parts = [mlp(params["obs"], obs), ops.relu(dense(params["action"], action)),
             ops.relu(dense(params["reward"], reward))]
    if config.use_object_slot:
        if objects is None:
            parts.append(parts[0] * 0)
        elif "objects" not in params:
            raise ShapeError("object_features were given, but this model has no weights for them; "
                             "make it with object_features=True")
        else:
            parts.append(ops.max(ops.relu(dense(params["objects"], objects)), axis=1))
    elif objects is not None:
        raise ShapeError("object_features were given, but the configuration has use_object_slot=False")
    return norm(params.get("norm"), mlp(params["fuse"], ops.concatenate(*parts, axis=-1)))


def new_decoder(rng, c, output_dim):
    """Parameters of :func:`decode`."""
    hidden = c.d_s + c.d_c
    tree = new_mlp(rng, hidden, hidden, hidden // 2, c.use_layer_norm)
    tree["last"] = new_dense(rng, hidden // 2, output_dim)
    return tree


def decode(params, config, s, c):
    """The action (B, output_dim) of [s; c]; within ± 1 where outputs are continuous."""
    y = dense(params["last"], ops.relu(mlp(params, ops.concatenate(s, c, axis=-1))))
    return ops.tanh(y) if config.output_type == "continuous" else y


def new_heads(rng, c, obs_dim, action_dim):
    """Parameters of the value head and of the world model, as far as the configuration has them."""
    tree = {}
    if c.value_head:
        tree["value"] = new_dense(rng, c.d_s + c.d_c, 1)
    if c.world_model_head:
        tree["world"] = new_mlp(rng, c.d_s + c.d_c + action_dim, c.d_s + c.d_c, obs_dim + 2, c.use_layer_norm)
    return tree


def value_of(params, s, c):
    """The value (B, 1) of [s; c]."""
    return dense(params["value"], ops.concatenate(s, c, axis=-1))


def foresee(params, s, c, action):
    """(next observation (B, obs_dim), its reward (B, 1), logit of the end (B, 1)) after ``action``."""
    y = mlp(params["world"], ops.concatenate(s, c, action, axis=-1))
    return y[:, :-2], y[:, -2:-1], y[:, -1:]


def world_model_loss(foreseen, obs, reward, done, *, reward_weight=1.0, done_weight=1.0):
    """MSE of the next observation + λ_r MSE of the reward + λ_d cross-entropy of the end."""
    next_obs, next_reward, ends = foreseen
    return (ops.mse_loss(next_obs, obs) + reward_weight * ops.mse_loss(next_reward, reward)
            + done_weight * ops.bce_with_logits(ends, done))
