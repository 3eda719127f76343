"""Muon for the hidden matrices of a model and AdamW for everything else, as one optimizer.

torch.optim.Muon takes matrices alone, one at a time, and orthogonalises in bf16 whatever the hardware; here matrices
of one shape are stacked, and a CPU without bf16 instructions works in fp32.
"""

import torch
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # on the norm of a matrix before it is divided by it
RMS = 0.2  # of AdamW's usual update, to which a matrix's is brought


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the groups with `matrices` True; torch's AdamW for the others.

    A matrix [m, n] moves by lr * 0.2 * sqrt(max(m, n)) times its orthogonalised Nesterov momentum, whose elements then
    have AdamW's usual size, so that one learning rate and one weight decay serve both kinds. The momentum is a running
    mean of gradients. Where AdamW can be fused, it is, and equals torch.optim.AdamW bit for bit.

    Args:
        params: parameters or groups of them; a group with `matrices` True holds matrices [m, n] only.
        lr: learning rate of all groups; weight_decay: decoupled, for groups that do not say their own.
        betas, eps, fused: AdamW's.
        momentum, nesterov, ns_steps: Muon's; ns_steps is the number of Newton-Schulz iterations.
        bf16: make them in bf16, which torch.optim.Muon always does.
    Raises:
        ValueError: a parameter in a group with `matrices` that is not a matrix, or a value out of range.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io); the
        scale is that of Liu et al. 2025 (arXiv:2502.16982).
    """

    matrices_apart = True  # common.optimizers.build_optimizer gives the hidden matrices in a group of their own

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        bf16=False,
        fused=None,
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps), ("ns_steps", ns_steps)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), but is {value}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "ns_steps": ns_steps, "fused": fused, "matrices": False}
        super().__init__(params, defaults)
        self.bf16 = bf16
        shapes = [tuple(p.shape) for group in self.param_groups if group["matrices"] for p in group["params"]]
        if odd := [shape for shape in shapes if len(shape) != 2]:
            raise ValueError(f"a parameter of shape {odd[0]} is no matrix")

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
            params = [p for p in group["params"] if p.grad is not None]
            (self._update_matrices if group["matrices"] else self._update_others)(group, params)
        return loss

    def _update_matrices(self, group, params):
        stacks = {}
        for p in params:
            stacks.setdefault((p.shape, p.device), []).append(p)
        for (shape, _), same in stacks.items():
            for p in same:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            wanted = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            stack = torch.stack(wanted)
            stack = stack.bfloat16() if self.bf16 else stack
            updates = orthogonalize(stack, group["ns_steps"]).to(same[0].dtype)
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, updates.unbind(), alpha=-group["lr"] * RMS * max(shape) ** 0.5)

    def _update_others(self, group, params):
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                self.state[p] |= {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        names = ("exp_avg", "exp_avg_sq", "step")
        exp_avgs, exp_avg_sqs, steps = ([self.state[p][name] for p in params] for name in names)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix near 1 (between about 0.7 and 1.2) by Newton-Schulz iterations.

    Args:
        matrices: [N, m, n] floating point.
        steps: iterations.
    Returns:
        [N, m, n], as given.
    Source: Jordan et al. 2024, with their quintic polynomial.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    if steps and x.dtype is not torch.bfloat16 and x.shape[2] >= 2 * x.shape[1]:
        x = _polynomial(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _polynomial(gram, steps):
    """What the iterations multiply a matrix by, from its Gram matrix [N, m, m] alone: cheaper where it is wide.

    Each iteration is x <- q x with q = a + b g + c g^2 and g = x x^T, so g <- q g q. Not for bf16, because the
    Gram matrix squares the singular values.
    """
    a, b, c = COEFFICIENTS
    product = None
    for step in range(steps):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q if product is None else q @ product
        if step + 1 < steps:
            gram = q @ gram @ q
    return product
