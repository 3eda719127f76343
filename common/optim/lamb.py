"""LAMB: Adam whose step on each matrix is as long, relative to the matrix, as the learning rate says."""

import torch


class Lamb(torch.optim.Optimizer):
    """Adam with a trust ratio on every matrix; vectors (biases, norms) take Adam's own step.

    m and v are the bias-corrected moments of the gradient g, r = m / (sqrt(v) + eps) + weight_decay * x, and a matrix
    moves by lr * |x| / |r| * r, by lr * r where either norm is 0. Works on parts of tensors that are DTensors, whose
    norms are those of the whole.

    Args:
        params: parameters or groups of them.
        lr: learning rate; weight_decay: decoupled from the moments, inside the ratio.
        betas: decay of the two moments; eps: added to the denominator.
    Raises:
        ValueError: a value out of range.
    Source: You et al. 2020 (arXiv:1904.00962), algorithm 2, with the identity as phi; their BERT code leaves biases
        and norms out of the ratio, too.
    """

    sees_whole_dtensors = True

    def __init__(self, params, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-6):
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        for name, value in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), but is {value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient.

        Args:
            closure: None, or a function that computes gradients again and returns the loss.
        Returns:
            closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter, group):
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # a tensor, as AdamW's
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(parameter.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        steps = state["step"].item()
        denominator = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update = mean / (1 - beta1**steps) / denominator
        update.add_(parameter, alpha=group["weight_decay"])
        if parameter.ndim > 1:
            size, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            ratio = size / length
            update.mul_(torch.where((size > 0) & (length > 0), ratio, torch.ones_like(ratio)))
        parameter.add_(update, alpha=-group["lr"])
