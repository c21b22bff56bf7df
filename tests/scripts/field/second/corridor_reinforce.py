import random
import torch
import torch.nn as nn


class Corridor:
    """Cells 0..n. Cell 0 is a pit (-1), cell n is the goal (+1), each move costs a little."""

    def __init__(self, n=6):
        self.n = n

    def reset(self):
        self.pos = random.randint(1, self.n - 1)
        self.t = 0
        return self._obs()

    def _obs(self):
        o = torch.zeros(self.n + 1)
        o[self.pos] = 1.0
        return o

    def step(self, action):
        self.pos += 1 if action == 1 else -1
        self.t += 1
        if self.pos == 0:
            return self._obs(), -1.0, True
        if self.pos == self.n:
            return self._obs(), 1.0, True
        return self._obs(), -0.02, self.t >= 40


class Policy(nn.Module):
    def __init__(self, n_obs):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_obs, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, obs):
        return torch.sigmoid(self.net(obs)).squeeze(-1)


def run_episode(env, policy):
    obs, done = env.reset(), False
    logps, rewards = [], []
    while not done:
        p_right = policy(obs)
        action = 1 if random.random() < p_right.item() else 0
        logps.append(torch.log(p_right if action == 1 else 1 - p_right))
        obs, r, done = env.step(action)
        rewards.append(r)
    return torch.stack(logps), rewards


def discounted(rewards, gamma=0.97):
    out, g = [], 0.0
    for r in reversed(rewards):
        g = r + gamma * g
        out.insert(0, g)
    return torch.tensor(out)


def main():
    random.seed(4)
    torch.manual_seed(4)
    env = Corridor()
    policy = Policy(env.n + 1)
    opt = torch.optim.Adam(policy.parameters(), lr=5e-3)
    score, mean_loss = 0.0, 0.0
    for ep in range(1, 251):
        logps, rewards = run_episode(env, policy)
        returns = discounted(rewards)
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        loss = -(logps * returns).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        score += sum(rewards)
        mean_loss += loss.item()
        if ep % 25 == 0:
            print(f"episode {ep} mean return {score / 25:.3f} loss {mean_loss / 25:.4f}")
            score, mean_loss = 0.0, 0.0


if __name__ == "__main__":
    main()
