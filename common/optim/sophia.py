"""Sophia-G: steps by the momentum over an estimate of the curvature, no longer than the learning rate."""

import torch


class Sophia(torch.optim.Optimizer):
    """Clipped momentum over the Gauss-Newton-Bartlett estimate of the loss's second derivatives.

    With gradients g and m <- beta1 m + (1 - beta1) g, each number moves by -lr * clip(m / max(gamma * h, eps), 1),
    after it was shrunk by lr * weight_decay. Before every `interval`-th step the caller takes the gradient s of the
    mean loss at B labels that it draws from the model itself, and calls update_curvature: h <- beta2 h + (1 - beta2)
    B s^2, whose mean is the diagonal of the Gauss-Newton matrix.

    Args:
        params: parameters or groups of them.
        lr: learning rate, the longest step of a number; weight_decay: decoupled.
        betas: decay of m and of h; gamma: the larger, the fewer steps are clipped; eps: least denominator.
        interval: steps from one estimate to the next.
    Raises:
        ValueError: a value out of range.
    Source: Liu et al. 2023 (arXiv:2305.14342), algorithms 2 and 3, with their numbers for Sophia-G.
    """

    own_betas_and_eps = True  # they are not those that Adam's flags set

    def __init__(self, params, lr=1e-3, weight_decay=0.01, betas=(0.96, 0.99), gamma=0.05, eps=1e-12, interval=10):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        for name, value in (("gamma", gamma), ("eps", eps)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, but is {value}")
        for name, value in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), but is {value}")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a number of steps, but is {interval}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "gamma": gamma, "eps": eps}
        super().__init__(params, defaults)
        self.interval = interval

    @torch.no_grad()
    def update_curvature(self, labels):
        """Take in an estimate. What is in the parameters' `grad` is s, and remains.

        Args:
            labels: B, how many s is the mean gradient of.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    beta2, drawn = group["betas"][1], parameter.grad
                    curvature = self._state(parameter)["curvature"]
                    curvature.mul_(beta2).addcmul_(drawn, drawn, value=(1 - beta2) * labels)

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

    def _state(self, parameter):
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["curvature"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _update(self, parameter, group):
        state = self._state(parameter)
        mean = state["exp_avg"].lerp_(parameter.grad, 1 - group["betas"][0])
        step = mean / (state["curvature"] * group["gamma"]).clamp_(min=group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step.clamp_(-1, 1), alpha=-group["lr"])
