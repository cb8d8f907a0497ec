"""A game so small that a CPU learns it within a minute: a block falls, and a paddle has to be where it lands.

The board is the observation. The ablations play it, and so do the tests that ask whether the scripts learn; the
options of the game bring out what a fix of the learning signal is for: late points, wasted steps, time limits.
"""

import numpy as np

SIZE = 8  # of the board, and of the observation
DOOR = 1.5  # points for leaving: less than chance scores in 100 steps, more than a good player on average in 16
FLAGS = dict(img_size=SIZE, channels=(16,), hiddens=(64,), local_num_envs=16, num_actor_threads=2, num_steps=32)
TUNED = {True: dict(learning_rate=2e-3), False: dict(learning_rate=2e-2)}  # PPO; IMPALA


def env_spec(args):
    """Stands in for a script's: shape of an observation, number of actions."""
    return (4, SIZE, SIZE), 3


class Catch:
    """Stands in for an EnvPool pool. A block falls from a random column; a paddle moves left, stays or moves right.

    Catching it scores 1, missing 0; either ends the episode. Every block can be caught; chance catches one in eight.

    height: rows that the block falls through. delay: steps from the landing to its point, and wait: from there to the
    end, in which nothing moves.
    limit: with it a new block comes instead of the end, and the episode is cut after so many steps. There is then a
    door too: moving left from the leftmost column ends the episode and scores DOOR.
    """

    def __init__(self, seeds: list[int], height: int = SIZE, delay: int = 0, wait: int = 0, limit: int = 0):
        self.height = height
        self.delay = delay
        self.wait = wait
        self.limit = limit
        self.generators = [np.random.default_rng(seed % 2**32) for seed in seeds]
        num_envs = len(seeds)
        self.env = np.arange(num_envs)
        self.score = np.zeros(num_envs)
        self.scores = []  # of whole games

    def drop(self, which):
        """Let new blocks fall in the environments `which`, bool[B]."""
        for i in np.flatnonzero(which):
            self.column[i] = self.generators[i].integers(SIZE)
        self.row[which] = SIZE - self.height
        self.waited[which] = 0

    def begin(self, which):
        """Begin episodes in the environments `which`, bool[B], the paddle within reach of the block."""
        self.drop(which)
        self.age[which] = 0
        for i in np.flatnonzero(which):
            low = max(0, self.column[i] - self.height + 1)
            high = min(SIZE, self.column[i] + self.height)
            self.paddle[i] = self.generators[i].integers(low, high)

    def observe(self):
        obs = np.zeros((len(self.env), 4, SIZE, SIZE), np.uint8)
        obs[self.env, 3, self.row, self.column] = 255
        obs[self.env, 3, SIZE - 1, self.paddle] = 255
        return obs

    def reset(self):
        num_envs = len(self.env)
        self.column, self.paddle, self.row, self.waited, self.age = np.zeros((5, num_envs), int)
        self.over = np.zeros(num_envs, bool)
        self.begin(~self.over)
        return self.observe(), {}

    def step(self, action):
        """Like EnvPool's: after an episode's end the action is ignored, and a new episode begins."""
        playing = ~self.over
        lying = self.row == SIZE - 1
        falling = playing & ~lying
        leaves = playing & (self.limit > 0) & (self.paddle == 0) & (action == 0)
        moved = np.clip(self.paddle + action - 1, 0, SIZE - 1)
        self.paddle = np.where(falling, moved, self.paddle)
        self.row += falling
        self.waited += playing & lying
        self.age += playing
        down = playing & (self.row == SIZE - 1)
        landed = down & (self.waited == self.delay)
        caught = landed & (self.paddle == self.column)
        reward = np.where(leaves, DOOR, caught).astype(np.float32)
        ends = down & (self.waited == self.delay + self.wait)
        terminated = leaves if self.limit else ends
        truncated = playing & ~terminated & (self.age == self.limit)  # never without a limit: the age is 1 or more
        self.over = terminated | truncated
        self.score += reward
        self.scores += self.score[self.over].tolist()
        self.score[self.over] = 0
        self.begin(~playing)
        if self.limit:
            self.drop(landed & ~self.over)
        info = {"reward": reward, "terminated": terminated.astype(np.int32)}
        return self.observe(), reward, terminated, truncated, info
