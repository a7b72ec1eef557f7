"""Atari against one emulator a game, frame by frame; what is learned from beside what is counted; names, settings, runs, films."""

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

import surefoot as sf
from surefoot.algorithms import of
from surefoot.envs import atari, make
from surefoot.envs.atari import MACHADO_2018, MNIH_2015, Atari, read_name
from surefoot.envs.check import check
from surefoot.report.video import GameCamera, film
from surefoot.training.checkpoint import CheckpointError
from surefoot.training.evaluate import evaluate
from surefoot.training.policy import Policy
from surefoot.types import counted

ale_py = pytest.importorskip("ale_py")
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
RAW = "height=210&width=160"  # the size of ALE's screen: nothing is scaled


class Emulator:
    """One game as the settings of `Atari` describe it, on ALE's interface for a single emulator."""

    def __init__(self, rom, settings, seed):
        self.settings, self.ale = settings, ale_py.ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setFloat("repeat_action_probability", settings.repeat_action_probability)
        self.ale.loadROM(ale_py.roms.get_rom_path(rom))
        self.actions = self.ale.getLegalActionSet() if settings.full_action_space else self.ale.getMinimalActionSet()

    def screen(self):
        return self.ale.getScreenGrayscale() if self.settings.grayscale else self.ale.getScreenRGB()

    def begin(self, num_frames):
        """A game after so many frames without the player."""
        self.ale.reset_game()
        for index in range(num_frames):
            self.ale.act(ale_py.Action.FIRE if self.settings.fire_on_reset and index == 0 else ale_py.Action.NOOP)
        self.elapsed, self.lives, self.pictures = 0, self.ale.lives(), [self.screen()]

    def stack(self):
        before = [np.zeros_like(self.pictures[-1])] * self.settings.frame_stack
        return np.stack([*before, *self.pictures][-self.settings.frame_stack :])

    def step(self, action):
        """(score, game over, life lost, cut, last picture)"""
        score, frames = 0, [np.zeros_like(self.pictures[-1])]
        for _ in range(self.settings.frame_skip):
            score += self.ale.act(self.actions[action])
            frames.append(self.screen())
            if self.ale.game_over():
                break
        self.pictures.append(np.maximum(*frames[-2:]) if self.settings.frame_pool else frames[-1])
        self.elapsed += self.settings.frame_skip
        lost_life, self.lives = 0 < self.ale.lives() < self.lives, self.ale.lives()
        return score, self.ale.game_over(), lost_life and self.settings.end_on_life_loss, self.elapsed >= self.settings.max_frames


@pytest.fixture
def num_frames(monkeypatch):
    """The frames [N] that each game of a vector had played when it was last begun, newest last."""
    from ale_py.vector_env import AtariVectorEnv

    begun, reset = [], AtariVectorEnv.reset

    def recorded(self, **how):
        obs, infos = reset(self, **how)
        begun.append(infos["episode_frame_number"].tolist())
        return obs, infos

    monkeypatch.setattr(AtariVectorEnv, "reset", recorded)
    return begun


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        (f"BreakoutNoFrameskip-v4?{RAW}&max_frames=700", {"game over", "life lost", "cut"}),
        (f"ALE/Pong-v5?{RAW}&max_frames=3400", {"game over", "cut"}),
        (
            f"ALE/Breakout-v5?{RAW}&frame_skip=3&frame_stack=3&frame_pool=false&full_action_space=true&grayscale=false"
            "&end_on_life_loss=true&noop_max=5&max_frames=401",
            {"life lost", "cut"},
        ),
    ],
)
def test_every_stream_is_a_game_on_its_own_emulator(name, ends, num_frames):
    """Observations, scores, rewards, ends, true successors; sticky actions too, since both draw from one generator."""
    num_envs = 3
    rom, settings = read_name(name)
    env, spec = make(name, num_envs)
    obs, mask = env.reset(5)
    games = [Emulator(rom, settings, seed) for seed in env._boundary.seeds]
    assert mask is None
    assert spec.action_space.n == len(games[0].actions)
    assert spec.observation_space.shape == (settings.frame_stack, 210, 160) + (3,) * (not settings.grayscale)
    for game, frames in zip(games, num_frames.pop(), strict=True):
        game.begin(frames)
    seen, rng = set(), np.random.default_rng(0)
    for _ in range(860 if "Pong" in name else 200):
        np.testing.assert_array_equal(obs, [game.stack() for game in games])
        action = rng.integers(spec.action_space.n, size=num_envs)
        step = env.step(action)
        obs, scores, over = step.obs, *counted(step)
        assert step.valid.all()
        begun = num_frames.pop() if num_frames else None
        for n, game in enumerate(games):
            score, is_over, lost_life, cut = game.step(action[n])
            assert (scores[n], over[n]) == (score, is_over or cut)
            assert step.reward[n] == (np.clip(score, -1, 1) if settings.clip_reward else score)
            assert (step.terminated[n], step.truncated[n]) == (is_over or lost_life, cut)
            if is_over or lost_life or cut:
                stack = game.stack()
                until = -1 if is_over else None  # ALE shows another frame than the last where a game is over
                np.testing.assert_array_equal(step.final_obs[n][:until], stack[:until])
                seen |= {name for name, here in (("game over", is_over), ("life lost", lost_life), ("cut", cut)) if here}
            if is_over or cut:
                game.begin(begun[n])
            elif lost_life:
                game.pictures = game.pictures[-1:]
    assert seen == ends
    env.close()


# The area average that scales pictures down, and what else ALE does alone


def area_weights(size, to):
    """[to, size] how much of each pixel lies within each pixel of the smaller picture, in shares."""
    edges = np.linspace(0, size, to + 1)
    inside = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
    return np.maximum(inside, 0.0) * to / size


def test_pictures_are_scaled_by_area():
    """To the nearest of 256 values; ALE averages in 32-bit floats, so that a tie may fall to either side."""
    (small, spec), (large, _) = make("ALE/Breakout-v5", 2), make(f"ALE/Breakout-v5?{RAW}", 2)
    rows, columns = area_weights(210, 84), area_weights(160, 84)
    obs, full = small.reset(0)[0], large.reset(0)[0]
    rng, num_ties = np.random.default_rng(0), 0
    for _ in range(25):
        exact = rows @ full.astype(np.float64) @ columns.T
        tie = np.abs(exact % 1 - 0.5) < 1e-4
        np.testing.assert_array_equal(obs[~tie], np.rint(exact)[~tie])
        assert (np.abs(obs - exact) < 0.5001).all()
        num_ties += tie.sum()
        action = rng.integers(spec.action_space.n, size=2)
        obs, full = small.step(action).obs, large.step(action).obs
    assert num_ties < 0.01 * obs.size * 25


@pytest.mark.parametrize(("fire", "expected"), [("false", {0, 1, 2, 3}), ("true", {1, 2, 3})])
def test_games_begin_with_up_to_so_many_frames_without_action(fire, expected, num_frames):
    env, _ = make(f"ALE/Breakout-v5?noop_max=3&fire_on_reset={fire}", 8)
    env.reset(0)
    for _ in range(8):
        env._begin(np.ones(8, bool))
    assert {frames for of_all in num_frames for frames in of_all} == expected


def trace(env, seed, num_steps):
    """Everything that random steps give."""
    rng, told = np.random.default_rng(3), [env.reset(seed)[0].copy()]
    for _ in range(num_steps):
        step = env.step(rng.integers(env.spec.action_space.n, size=env.spec.num_envs))
        told.append(jax.tree.map(np.copy, step._replace(final_obs=step.final_obs[step.terminated | step.truncated])))
    return told


@pytest.mark.parametrize("name", ["BreakoutNoFrameskip-v4?max_frames=300", "ALE/Breakout-v5?max_frames=300"])
def test_the_seed_decides_everything_whatever_the_threads(name, monkeypatch):
    env, _ = make(name, 3)
    first = trace(env, 7, 160)
    assert sum(counted(step)[1].sum() for step in first[1:]) == 6
    jax.tree.map(np.testing.assert_array_equal, first, trace(env, 7, 160))
    monkeypatch.setattr(atari, "num_processors", lambda: 1)
    jax.tree.map(np.testing.assert_array_equal, first, trace(make(name, 3)[0], 7, 160))
    other = trace(env, 8, 60)
    assert any((a.obs != b.obs).any() for a, b in zip(first[1:], other[1:], strict=False))
    assert all(any((step.obs[a] != step.obs[b]).any() for step in first[1:]) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_rewards_are_clipped_for_learning_alone(monkeypatch):
    env, _ = make("BreakoutNoFrameskip-v4", 3)
    env.reset(0)
    play = env._games.step
    monkeypatch.setattr(env._games, "step", lambda action: (lambda obs, _, *rest: (obs, np.array([7, -3, 0]), *rest))(*play(action)))
    step = env.step(np.zeros(3, int))
    assert step.reward.tolist() == [1, -1, 0]
    assert step.score.tolist() == [7, -3, 0]
    assert step.reward.dtype == step.score.dtype == np.float32


def test_a_life_is_lost_where_one_fewer_is_left():
    """Not where there is one more, nor where none is left although the game goes on, which ends a little later."""
    env, _ = make("BreakoutNoFrameskip-v4?max_frames=12", 3)
    obs, _ = env.reset(0)
    obs, no = obs.copy(), np.zeros(3, bool)
    lives = iter([[4, 0, 6], [4, 0, 6], [4, 0, 5], [5, 5, 5], [4, 5, 5]])  # the fourth is that of new games

    class Script:
        def step(self, action):
            return obs, np.zeros(3, np.int32), no, no, {"lives": np.array(next(lives))}

        def reset(self, options):
            assert options["reset_mask"].all()
            return obs, {"lives": np.array(next(lives))}

    env._games, told = Script(), []
    for _ in range(4):
        step = env.step(np.zeros(3, int))
        told.append((step.terminated.tolist(), step.truncated.all(), step.game_over.all()))
    assert told == [
        ([True, False, False], False, False),
        ([False, False, False], False, False),
        ([False, False, True], True, True),
        ([True, False, False], False, False),
    ]


def test_nothing_is_left_to_the_defaults_of_ale(monkeypatch):
    from ale_py import vector_env

    given, build = {}, vector_env.AtariVectorEnv

    def recorded(rom, num_envs, **settings):
        given.update(settings)
        return build(rom, num_envs, **settings)

    monkeypatch.setattr(vector_env, "AtariVectorEnv", recorded)
    make("ALE/Pong-v5", 1)
    parameters = inspect.signature(build.__init__).parameters.values()
    assert given.keys() == {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


# Names and settings


def test_an_id_of_ale_is_played_as_ale_registers_it():
    registered = gymnasium.spec("ALE/Pong-v5").kwargs
    rom, settings = read_name("ALE/Pong-v5")
    assert settings == Atari(**MACHADO_2018)
    ours = settings.repeat_action_probability, settings.full_action_space, settings.frame_skip, settings.max_frames, rom
    names = "repeat_action_probability", "full_action_space", "frameskip", "max_num_frames_per_episode", "game"
    assert ours == tuple(registered[name] for name in names)


def test_an_id_without_frame_skip_is_played_as_by_mnih():
    rom, settings = read_name("MsPacmanNoFrameskip-v4")
    assert (rom, settings) == ("ms_pacman", Atari(**MNIH_2015))
    expected = {"repeat_action_probability": 0.0, "noop_max": 30, "end_on_life_loss": True, "clip_reward": True, "frame_skip": 4}
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_the_page_has_the_settings_of_both_protocols(language):
    page = Path(__file__).parents[2] / "docs" / f"environments{language}.md"
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \|", page.read_text(), re.MULTILINE)
    for column, name in ((1, "ALE/Pong-v5"), (2, "PongNoFrameskip-v4")):
        assert {row[0]: ast.literal_eval(row[column]) for row in rows} == dataclasses.asdict(read_name(name)[1])


def test_settings_in_a_name():
    _, settings = read_name("ALE/Pong-v5?repeat_action_probability=0&clip_reward=True&max_frames=1e3")
    assert settings == dataclasses.replace(Atari(**MACHADO_2018), repeat_action_probability=0.0, clip_reward=True, max_frames=1000)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ALE/Pong-v4", "There is no Atari game 'ALE/Pong-v4', did you mean 'ALE/Pong-v5'"),
        ("ALE/Breakot-v5?frame_skip=3", "There is no Atari game 'ALE/Breakot-v5', did you mean 'ALE/Breakout-v5'"),
        ("PongNoFrameskip-v0", "There is no Atari game 'PongNoFrameskip-v0', did you mean 'PongNoFrameskip-v4'"),
        ("ALE/Combat-v5", "There is no Atari game 'ALE/Combat-v5'"),
        ("ALE/Pong-v5?frameskip=3", r"Atari has no setting 'frameskip', did you mean 'frame_skip'\?"),
        (
            "ALE/Pong-v5?clip_reward=2",
            r"Atari.clip_reward expects bool, got 2 \(int\)\. Settings are given as in ALE/Pong-v5\?frame_skip=4",
        ),
        ("ALE/Pong-v5?frame_skip=0", r"Atari.frame_skip must lie in \[1, inf\), got 0"),
        ("ALE/Pong-v5?repeat_action_probability=1.5", r"repeat_action_probability must lie in \[0, 1\], got 1.5"),
        ("ALE/Pong-v5?frame_skip=4&frame_skip=5", "a setting is given twice"),
        ("ALE/Pong-v5?frame_skip", "'frame_skip'. Settings are given as in"),
        ("ALE/Pong-v5?frame_skip=", "Atari.frame_skip expects int, got ''"),
    ],
)
def test_what_there_is_not_is_refused_with_the_nearest(name, problem):
    with pytest.raises(ValueError, match=problem):
        make(name, 1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(atari.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(ValueError, match=r"needs ale-py 0\.12\.1 or newer, and 0\.12\.0 is installed: pip install --upgrade"):
        make("ALE/Pong-v5", 1)
    monkeypatch.setattr(atari.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'ALE/Pong-v5 needs ALE, which is not installed: pip install "surefoot\[atari\]"'):
        make("ALE/Pong-v5", 1)


# Runs, evaluations, films

TINY = "BreakoutNoFrameskip-v4?height=36&width=36&frame_stack=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of PPO with fully connected layers, and what every step of its games was."""
    with pytest.MonkeyPatch.context() as patch:
        steps, play = [], atari.AtariEnvironment.step

        def recorded(self, action):
            step = play(self, action)
            steps.append([x.copy() for x in (*counted(step), step.terminated)])
            return step

        patch.setattr(atari.AtariEnvironment, "step", recorded)
        config = sf.PPO(num_steps=64, minibatch_size=128, epochs=1, hidden=(8,), network="mlp")
        run = sf.train(config, TINY, steps=2_560, num_envs=4, seed=0, preset=False, out=tmp_path_factory.mktemp("atari") / "run")
    return run, [np.stack(column) for column in zip(*steps, strict=True)]


def test_a_run_counts_whole_games_and_their_scores(run):
    run, (score, over, terminated) = run
    games, begin = [], np.zeros(4, int)
    for t, n in np.argwhere(over):
        games.append((score[begin[n] : t + 1, n].sum(), t + 1 - begin[n]))
        begin[n] = t + 1
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes"] == len(games) > 4
    returns, lengths = zip(*games, strict=True)
    assert (last["episode_return"], last["episode_length"]) == pytest.approx((np.mean(returns), np.mean(lengths)))
    assert terminated.sum() > 3 * over.sum()


def test_a_run_records_how_its_games_were_played(run, capsys):
    record = json.loads((run[0].path / "run.json").read_text())
    _, settings = read_name(TINY)
    assert record["environment_settings"] == dataclasses.asdict(settings)
    assert (record["resume"], record["versions"]["ale-py"]) == ("episodes restart", ale_py.__version__)
    assert "frame skip" in run[0].report().read_text()


def test_a_run_is_not_continued_with_games_played_otherwise(run, tmp_path):
    path = tmp_path / "run.json"
    record = json.loads((run[0].path / "run.json").read_text())
    record["environment_settings"]["frame_skip"] = 5
    (run[0].path / "run.json").rename(path)
    try:
        (run[0].path / "run.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match="frame_skip was 5 and is now 4"):
            sf.resume(run[0].path, progress=False)
    finally:
        path.rename(run[0].path / "run.json")


def test_a_run_resumes_with_new_games_and_says_what_it_cannot(run, capsys):
    sf.resume(run[0].path)
    said = capsys.readouterr().err
    assert "its episodes start anew" in said
    assert "note: the observation is an image, of which network='mlp' sees a list of numbers" in said


def policy_for(name, **settings):
    _, spec = make(name, 1)
    config = sf.PPO(hidden=(8,), **settings)
    return Policy(config, spec, jax.jit(lambda key: of(config).init(config, spec, key).acting)(jax.random.key(0)))


def test_an_evaluation_plays_whole_games_for_their_scores():
    """With one picture in a stack a lost life changes nothing that a policy sees."""
    name = "BreakoutNoFrameskip-v4?height=9&width=9&frame_stack=1"
    policy = policy_for(name)
    returns = evaluate(policy, name, episodes=4, deterministic=False)
    whole = evaluate(policy, f"{name}&end_on_life_loss=false&clip_reward=false", episodes=4, deterministic=False)
    assert returns.tolist() == whole.tolist()
    assert returns.max() > 1


def test_dqn_learns_from_pictures(tmp_path):
    config = sf.DQN(num_steps=8, update_to_data=0.125, minibatch_size=4, learning_starts=16, replay_size=400, network="nature")
    run = sf.train(config, TINY, steps=64, num_envs=2, preset=False, out=tmp_path / "run", progress=False)
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["td_error"] >= 0
    assert last["gradient_norm"] > 0
    assert run.policy.act(np.zeros((2, 36, 36), np.uint8)) in range(4)


def test_a_film_shows_the_game_that_is_played():
    name = f"BreakoutNoFrameskip-v4?{RAW}&max_frames=440"
    rom, settings = read_name(name)
    in_colour = dataclasses.replace(settings, grayscale=False, frame_stack=1)
    camera, alone = GameCamera(name), make(name, 1)[0]
    camera.reset(3)
    alone.reset(3)
    rng, num_games = np.random.default_rng(0), 0
    twin = atari.AtariEnvironment(name, rom, in_colour, 1)
    expected = [twin.reset(3)[0][0, 0].copy()]
    for _ in range(250):
        while expected:
            np.testing.assert_array_equal(camera.render()[::2, ::2], expected.pop(0))
        action = rng.integers(4, size=1)
        step, same = camera.step(action), alone.step(action)
        jax.tree.map(np.testing.assert_array_equal, step, same)
        seen = twin.step(action)
        over = bool(counted(step)[1][0])
        num_games += over
        expected = [seen.final_obs[0, 0].copy()] * over + [seen.obs[0, 0].copy()]
    assert num_games > 1
    assert camera.metadata == {"render_fps": 15.0}
    camera.close()


def test_the_episodes_of_a_film_are_whole_games():
    name = "BreakoutNoFrameskip-v4?height=9&width=9&max_frames=400"
    policy, lengths = policy_for(name), []
    how = {"episodes": 2, "deterministic": False, "max_fps": 50, "on_moment": lambda moment: moment.ended and lengths.append(moment.length)}
    with film(policy, name, **how) as (pictures, fps, returns):
        shapes = [picture.shape for picture in pictures]
    assert lengths == [100, 100]
    assert set(shapes) == {(420, 320, 3)}
    assert len(shapes) == 2 * (100 + 8)  # and half a second of each end
    assert (fps, len(returns)) == (15.0, 2)


def test_checking_a_game_says_what_holds_for_it():
    findings = check("BreakoutNoFrameskip-v4", num_steps=400)
    assert {finding.level for finding in findings} == {"note"}
    assert any("2 episodes ended, 2 terminated and 0 truncated" in finding.sentence for finding in findings)
    assert [finding.remedy for finding in findings if "cannot be saved" in finding.sentence] == [""]
