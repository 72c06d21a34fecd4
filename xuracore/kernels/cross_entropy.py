"""Cross-entropy of rows of logits against class indices, with label smoothing ε.

    loss_i = (1-ε) (z_i - x_i[target_i]) + ε (z_i - mean_j x_i[j]),     z_i = log Σ_j e^x_i[j]
    dx_i = grad_i (softmax(x_i) - (1-ε) onehot(target_i) - ε / classes)

Rows whose target is ``ignore_index`` have loss and gradient zero.  The sums that make the loss are
float64 whatever the logits are, but for runs of RUN neighbours, which are summed in the logits' own type.
Arrays are C-contiguous; outputs are allocated by the caller.
"""

import math

import numpy as np

from xuracore.jit import REDUCE, kernel, prange
from xuracore.kernels.fastmath import exp, exp2, order, unorder

RUN = 256
LOG2_E = 1 / math.log(2)


def cross_entropy_forward_numpy(logits, target, maximum, ignore_index, smoothing, loss, log_sum):
    """loss and log_sum (rows,) float64, log_sum = z - maximum; maximum (rows,) of each row is put out too.

    logits (rows, classes), target (rows,) int64.  The loss of a target that is not a class is 0, whether it is
    ignore_index or wrong: :func:`total_loss` counts both.
    """
    maximum[...] = logits.max(axis=1)
    shifted = np.subtract(logits, maximum[:, None], dtype=np.float64)
    log_sum[...] = np.log(np.sum(np.exp(shifted), axis=1))
    keep = (target != ignore_index) & (target >= 0) & (target < logits.shape[1])
    hit = shifted[np.arange(len(target)), np.where(keep, target, 0)]
    smooth = log_sum - shifted.mean(axis=1) if smoothing else 0.0
    loss[...] = np.where(keep, (1 - smoothing) * (log_sum - hit) + smoothing * smooth, 0.0)


@kernel(twin=cross_entropy_forward_numpy, parallel=True, fastmath=REDUCE)
def cross_entropy_forward(logits, target, maximum, ignore_index, smoothing, loss, log_sum):
    rows, classes = logits.shape
    number = logits.dtype.type
    rate = number(LOG2_E)
    for i in prange(rows):
        best = order(logits[i, 0])
        for j in range(classes):
            place = order(logits[i, j])
            best = place if place > best else best
        top = unorder(logits[i, 0], best)
        maximum[i] = top
        total = 0.0
        for run in range((classes + RUN - 1) // RUN):
            start = run * RUN
            part = number(0)
            for j in range(min(RUN, classes - start)):
                part += exp2((logits[i, start + j] - top) * rate)  # its rounding is least where a term counts
            total += np.float64(part)
        log_sum[i] = math.log(total)
        if target[i] == ignore_index or target[i] < 0 or target[i] >= classes:
            loss[i] = 0.0
        else:
            hit = np.float64(logits[i, target[i]]) - np.float64(top)
            loss[i] = (1.0 - smoothing) * (log_sum[i] - hit)
            if smoothing != 0.0:
                level = 0.0
                for j in range(classes):
                    level += np.float64(logits[i, j]) - np.float64(top)
                loss[i] += smoothing * (log_sum[i] - level / classes)


def total_loss_numpy(loss, target, ignore_index, classes, out):
    """out ← (Σ loss, how many targets are ignore_index, how many others are not one of the classes)."""
    ignored = target == ignore_index
    out[:] = np.sum(loss), np.sum(ignored), np.sum(~ignored & ((target < 0) | (target >= classes)))


@kernel(twin=total_loss_numpy, fastmath=REDUCE)
def total_loss(loss, target, ignore_index, classes, out):
    total, ignored, wrong = 0.0, 0, 0
    for i in range(target.size):
        total += loss[i]
        if target[i] == ignore_index:
            ignored += 1
        elif target[i] < 0 or target[i] >= classes:
            wrong += 1
    out[0], out[1], out[2] = total, ignored, wrong


def cross_entropy_backward_numpy(grad, logits, target, maximum, log_sum, ignore_index, smoothing, dx):
    """dx (rows, classes) from grad (rows,) and what the forward pass saw and kept."""
    keep = target != ignore_index
    probability = np.exp(np.subtract(logits, maximum[:, None], dtype=np.float64) - log_sum[:, None])
    probability -= smoothing / logits.shape[1]
    probability[np.arange(len(target)), np.where(keep, target, 0)] -= 1 - smoothing
    dx[...] = np.where(keep, grad, 0)[:, None] * np.where(keep[:, None], probability, 0)


@kernel(twin=cross_entropy_backward_numpy, parallel=True)
def cross_entropy_backward(grad, logits, target, maximum, log_sum, ignore_index, smoothing, dx):
    rows, classes = logits.shape
    number = logits.dtype.type
    for i in prange(rows):
        if target[i] == ignore_index:
            for j in range(classes):
                dx[i, j] = number(0)
        else:
            top, shift = maximum[i], number(log_sum[i])
            weight, level = number(grad[i]), number(smoothing / classes)
            for j in range(classes):
                dx[i, j] = weight * (exp((logits[i, j] - top) - shift) - level)
            dx[i, target[i]] -= weight * number(1.0 - smoothing)
