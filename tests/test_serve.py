"""The policy server as its users meet it: the stock client, keys, several clients, a server that dies, and 10,000 requests that are wrong.

Everything listens at 127.0.0.1, at ports that were free. `openpi-client` is used where it is installed.
"""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from urllib.request import urlopen

import msgpack
import numpy as np
import psutil
import pytest
import torch
from conftest import ENV
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from defi_nb.weights.checkpoint import save_checkpoint
from defi_nb.models.encoders import load_encoders
from defi_nb.weights.load import model_info
from defi_nb.models.policy import PlainConfig, PlainPolicy
from defi_nb.eval.rollout import NoOpPolicy
from defi_nb.serve.inference import Contract
from defi_nb.serve.server import PolicyServer, serving
from defi_nb.serve.protocol import Client, pack, unpack

CODE = "from defi_nb.serve.server import main; raise SystemExit(main())"


class PairMaps:
    "A policy whose actions depend on all it is given, and that takes its time."
    seconds = 0.

    def act(self, batch, noise):
        time.sleep(self.seconds)
        seen = batch.video.float().mean((1, 2, 3, 4, 5))/255 + batch.proprio.mean(1) + torch.tensor([len(t) for t in batch.text])/100
        return (noise/4 + seen[:, None, None]).tanh()


def contract(**changes): return Contract("looks", views=("static", "gripper"), state=15, **changes)


def observation(k=0):
    rng = np.random.default_rng(k)
    return {"observation/image": rng.integers(0, 256, (20 + k, 30, 3), np.uint8), "observation/wrist_image": rng.integers(0, 256, (16, 16, 3), np.uint8),
            "observation/state": rng.normal(size=15)/10, "prompt": "push"*(k + 1)}


@contextmanager
def command(*argv, **env):
    "A server in a process of its own, and its address."
    with subprocess.Popen([sys.executable, "-c", CODE, *argv, "--port", "0"], stdout=subprocess.PIPE, text=True, env=ENV | env) as process:
        try:
            line = process.stdout.readline()
            assert " at ws://127.0.0.1:" in line, line
            yield process, line.split(" at ")[1].split(": ")[0]
        finally: process.kill()


def test_round_trip():
    with serving(PolicyServer(PairMaps(), contract())) as url, Client(url) as client:
        assert client.metadata["cameras"] == {"static": "observation/image", "gripper": "observation/wrist_image"} and client.metadata["state"]["size"] == 15
        a, b = client.infer(observation(1)), client.infer(observation(1))
        assert a["actions"].shape == (10, 7) and a["actions"].dtype == np.float32 and np.abs(a["actions"]).max() <= 1
        assert set(a["actions"][:, -1]) <= {-1, 1} and (a["actions"] != b["actions"]).any()


def test_stock_client():
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    broker = pytest.importorskip("openpi_client.action_chunk_broker")
    with serving(PolicyServer(PairMaps(), contract(), key="secret")) as url:
        host, port = url.removeprefix("ws://").split(":")
        policy = client.WebsocketClientPolicy(host, int(port), api_key="secret")
        assert policy.get_server_metadata()["horizon"] == 10
        chunk = policy.infer(observation())["actions"]
        with Client(url, "secret") as ours: np.testing.assert_array_equal(ours.infer(observation())["actions"], chunk)
        with pytest.raises(RuntimeError, match="the request has no 'observation/image'"): policy.infer({})
        steps = broker.ActionChunkBroker(policy, action_horizon=5)
        one = [steps.infer(observation())["actions"] for _ in range(7)]
        assert {a.shape for a in one} == {(7,)} and policy.infer(observation())["actions"].shape == (10, 7)
        assert urlopen(f"http://{host}:{port}/healthz").read() == b"OK\n"
        policy._ws.close()


@pytest.mark.parametrize("key,said", [(None, "a key is needed"), ("wrong", "wrong key"), ("", "a key is needed"), ("secret ", "wrong key")])
def test_key(key, said):
    with serving(PolicyServer(NoOpPolicy(), Contract("noop"), key="secret")) as url:
        if key == "secret ": # a client's library strips it; the header must be the key exactly
            with pytest.raises(InvalidHandshake): connect(url, additional_headers={"Authorization": "Api-Key secretsecret"}).__enter__()
        else:
            with pytest.raises(PermissionError, match=said): Client(url, key)
        with Client(url, "secret") as client: assert client.metadata["policy"] == "noop"


def test_key_is_read_from_the_environment_or_a_file(tmp_path):
    (tmp_path/"key").write_text("filed\n")
    for argv, env, key in (([], {"DEFI_NB_KEY": "environed"}, "environed"), (["--key-file", str(tmp_path/"key")], {"DEFI_NB_KEY": "environed"}, "filed")):
        with command("noop", *argv, **env) as (_, url):
            with pytest.raises(PermissionError): Client(url)
            with Client(url, key) as client: assert client.infer(observation())["actions"][0].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_web_pages_are_refused():
    with serving(PolicyServer(NoOpPolicy(), Contract("noop"))) as url, pytest.raises(InvalidHandshake, match="403"): connect(url, origin="http://127.0.0.1").__enter__()


def test_too_large():
    with serving(PolicyServer(PairMaps(), contract(), max_bytes=20_000)) as url, Client(url) as client:
        right = client.infer(observation())["actions"]
        with pytest.raises(ConnectionError, match="1009"): client.infer(observation() | {"more": bytes(30_000)})
        np.testing.assert_array_equal(client.infer(observation())["actions"], right)


def test_port_in_use():
    with serving(PolicyServer(NoOpPolicy(), Contract("noop"))) as url:
        done = subprocess.run([sys.executable, "-c", CODE, "noop", "--port", url.split(":")[-1]], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("defi-nb: can't listen at 127.0.0.1:") and "choose another --host or --port" in done.stderr


@pytest.mark.parametrize("argv,said", [(["noop", "--name", "front=x"], "static, gripper, state, prompt"), (["no/such/folder"], "no/such/folder"), (["noop", "--port", "99999"], "65536"),
                                       (["noop", "--batch", "0"], "at least 1"), (["noop", "--key-file", "no/such/key"], "no/such/key"), (["noop", "--host", "0.0.0.0"], "it has no key")])
def test_wrong_arguments(argv, said, capsys):
    from defi_nb.serve.server import main
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("defi-nb: ") and said in error and error.count("\n") == 1


def test_clients_share_batches_and_get_what_they_get_alone():
    def ask(url, k):
        with Client(url) as client: return [client.infer(observation(k) | {"reset": i == 2})["actions"] for i in range(4)]
    slow = PairMaps()
    slow.seconds = .01
    together = PolicyServer(slow, contract(), window=.1)
    with serving(together) as url, ThreadPoolExecutor(6) as pool: found = list(pool.map(lambda k: ask(url, k), range(6)))
    assert max(together.batches) > 1 and sum(n*k for n, k in together.batches.items()) == 24
    for k in range(6):
        alone = PolicyServer(PairMaps(), contract(), batch=1)
        with serving(alone) as url: np.testing.assert_allclose(found[k], ask(url, k), atol=1e-5)
        assert set(alone.batches) == {1}


def test_a_chain_over_the_wire_is_the_chain_at_home():
    from defi_nb.sim.calvin_tasks import get_sequences
    from defi_nb.eval.rollout import Chain, EvalConfig, play_policy, playtable_env
    config, sequence = EvalConfig.tiny(steps=12, static_size=40), get_sequences(2)[1] # pictures that are resized
    env = playtable_env(config)
    home = play_policy(PairMaps(), [env], [(1, sequence)], config)[0].actions
    with serving(PolicyServer(PairMaps(), contract())) as url, Client(url) as client:
        chain = Chain(1, sequence, env)
        while not chain.done:
            obs = {"observation/image": chain.obs["rgb_obs"]["rgb_static"], "observation/wrist_image": chain.obs["rgb_obs"]["rgb_gripper"], "observation/state": chain.obs["robot_obs"],
                   "prompt": chain.text, "noise_key": [config.seed, chain.index, chain.solved, chain.queries]}
            chain.run(client.infer(obs)["actions"][:config.execute].astype(float), config.steps)
    env.close()
    np.testing.assert_array_equal(chain.actions, home)


STOPPED = """
import sys
from defi_nb.serve.protocol import Client
client = Client(sys.argv[1], timeout=20)
for _ in range(2):
    print(client.infer({"observation/image": __import__("numpy").zeros((8, 8, 3), "uint8"), "prompt": "push"})["actions"].tolist(), flush=True)
    sys.stdin.readline()
"""


def test_a_client_that_is_stopped_for_a_while(monkeypatch):
    "By a debugger or at an emergency stop, for longer than the server waits for its pings (here 1.5 s, else 40): it connects anew by itself."
    monkeypatch.setattr("defi_nb.serve.server.serve", partial(serve, ping_interval=.5, ping_timeout=1))
    with serving(PolicyServer(NoOpPolicy(), Contract("noop"))) as url:
        with subprocess.Popen([sys.executable, "-c", STOPPED, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV) as process:
            first = process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            process.send_signal(signal.SIGCONT)
            assert process.communicate("\n\n", timeout=60)[0] == first and np.array(json.loads(first)).shape == (10, 7)


def test_server_that_is_killed():
    with command("noop") as (process, url):
        client = Client(url, timeout=20)
        client.infer(observation())
        os.kill(process.pid, signal.SIGSTOP) # so that it is killed in the middle of a request
        threading.Timer(.5, process.kill).start()
        with pytest.raises(ConnectionError, match="closed the connection before it answered"): client.infer(observation())
        process.wait()
        with pytest.raises(ConnectionError, match="no policy server answers"): client.infer(observation())


def test_sigterm_answers_what_is_computed_and_ends():
    slow = PairMaps()
    slow.seconds = 1.
    server, found = PolicyServer(slow, contract()), []
    with serving(server) as url:
        client = Client(url)
        asking = threading.Thread(target=lambda: found.append(client.infer(observation())["actions"].shape))
        asking.start()
        while not server.busy: time.sleep(.01)
    asking.join()
    assert found == [(10, 7)]
    with command("noop") as (process, url):
        process.terminate()
        assert process.wait(20) == 0


def test_goes_on_and_ends_when_nobody_reads_what_it_says():
    with command("noop") as (process, url):
        process.stdout.close()
        for _ in range(2):
            with Client(url) as client: assert client.infer(observation())["actions"].shape == (10, 7)
        process.terminate()
        assert process.wait(30) == 0


# clients that do not read

def stuck(url, frame, n):
    "A socket that is a websocket by hand, and sends n frames without reading."
    host, port = url[5:].split(":")
    found = socket.create_connection((host, int(port)), 10)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found.sendall(f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {'A'*22}==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    assert b" 101 " in found.recv(4096)
    found.settimeout(5)
    try:
        for _ in range(n): found.sendall(frame)
    except OSError: pass # dropped, or nobody takes more
    return found


def frame(kind, data): # masked with zeros, as a client's may be
    size = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0x80 | 126]) + len(data).to_bytes(2, "big")
    return bytes([0x80 | kind]) + size + bytes(4) + data


def test_a_flood_of_pings():
    "The server's memory stays, others are answered, and it ends soon."
    with command("noop") as (process, url):
        with Client(url) as client: client.infer(observation())
        before = psutil.Process(process.pid).memory_info().rss
        held = stuck(url, frame(9, bytes(125)), 400_000)
        with Client(url) as client: assert client.infer(observation())["actions"].shape == (10, 7)
        assert psutil.Process(process.pid).memory_info().rss < before + 20*2**20
        process.terminate()
        assert process.wait(30) == 0
        held.close()


@pytest.mark.parametrize("patience", [.5, 60.])
def test_answers_that_are_not_read(patience):
    "Dropped after a while; a server that is stopped before that ends within 10 s."
    said, large = [], contract(horizon=200_000) # answers of 5.6 MB, more than the system holds
    server = PolicyServer(PairMaps(), large, patience=patience, log=said.append)
    with serving(server) as url:
        held = stuck(url, frame(2, pack(observation())), 3)
        end = time.monotonic() + (20 if patience < 1 else 3)
        while not server.open: time.sleep(.01)
        while server.open and time.monotonic() < end: time.sleep(.05)
        assert server.open == (patience > 1)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert any("dropped, because it did not read its answer for 0.5 s" in str(line) for line in said) == (patience < 1)
    held.close()


# 10,000 wrong requests

def mutate(rng, data):
    "A valid message with some of its bytes changed, cut, repeated or moved."
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        i = rng.randrange(min(len(data), 200) if rng.random() < .7 else len(data)) # mostly where the structure is
        kind = rng.randrange(4)
        if kind == 0: data[i] = rng.randrange(256)
        elif kind == 1 and len(data) > 10: del data[i:i + rng.randint(1, 5)]
        elif kind == 2: data[i:i] = rng.randbytes(rng.randint(1, 5))
        else: data[i:i] = data[i:i + rng.randint(1, 40)]
    return bytes(data)


def raw(data=b"\1"*8, dtype="<f4", shape=(2,)): return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)}


def wrong_values(rng):
    "An observation with something wrong in it."
    dtypes = ["|O", "|V8", "<c8", "<M8[s]", "<U2", "|S8", "f4,f4", "<f2", "", "x"*1000, 7, None, "<f16", "|b1"]
    shapes = [(2**40,), (-1,), (2,)*40, (0, 2**31 - 1), (1.5,), ("a",), (2**63 - 1, 2**63 - 1), (True,), (), (3,)]
    values = [np.zeros((0, 0, 3), np.uint8), np.zeros((5, 0, 3), np.uint8), np.zeros((1, 5000, 3), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8),
              np.full(15, np.nan), np.full(15, np.inf), np.full(15, 1e300), np.zeros(14), np.zeros((15, 1)), None, True, -1, 2**63, 1e308, "", "a"*5000, b"", b"\xff"*50, [], {}, [[]]*50, {"a": {"b": {}}},
              raw(dtype=rng.choice(dtypes)), raw(shape=rng.choice(shapes)), raw(data=rng.choice([b"", "text", 5, None, [1]])), {b"__ndarray__": True}, {b"__npgeneric__": True, b"data": 3e38, b"dtype": "<i2"},
              msgpack.ExtType(rng.randrange(128), b"x"*rng.randrange(20)), msgpack.Timestamp(1), {"x": rng.random()}]
    obs = observation(rng.randrange(3))
    kind = rng.randrange(4)
    if kind == 0: obs.pop(rng.choice(sorted(obs)))
    elif kind == 1: obs["noise_key"] = rng.choice([[], [-1], [1.5], [2**64 - 1], ["a"], list(range(9)), {}, "x", [True], np.zeros(3), [[1]]])
    else: obs[rng.choice(sorted(obs))] = rng.choice(values)
    return msgpack.packb(obs, default=lambda x: {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape})


def hostile(rng):
    "Structures that are cheap to send and dear to read."
    deep = rng.randint(20, 20_000)
    if rng.random() < .02: return rng.choice([b"\x90", b"\xc4"])*rng.randint(2**20 + 1, 2**21) # beyond the size limit
    return rng.choice([b"\x91"*deep + b"\xc0", b"\x81\xa1a"*deep + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\xc0", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff" + b"a"*100,
                       b"\xdc\xff\xff" + b"\x90"*65535, b"\xc9\xff\xff\xff\xff\x05", b"\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\xc0"*4095)*30, b"\x82" + b"\xa1a\xc0"*2, b"\xc1", b"",
                       b"\x81\xc0\xc0", b"\x81\x01\x01", b"\x81\x90\x01"])


def wrong_message(rng):
    kind = rng.random()
    if kind < .2: return rng.randbytes(rng.randrange(300))
    if kind < .5: return mutate(rng, pack(observation(rng.randrange(3))))
    if kind < .75: return wrong_values(rng)
    if kind < .9: return hostile(rng)
    return rng.choice(["", "{}", "a"*rng.randrange(3000), '{"prompt": "x"}', "\0"])


def over_websocket(url, rng, n, outcomes):
    "Send n messages; each must be answered by a text, an answer or a close with a reason, in time."
    connection = None
    for _ in range(n):
        if connection is None:
            connection = connect(url, compression=None, max_size=None, proxy=None, additional_headers={"Authorization": "Api-Key secret"}).__enter__()
            connection.recv(60)
        data = wrong_message(rng)
        try:
            connection.send(data)
            said = connection.recv(60) # a TimeoutError fails the test
        except ConnectionClosed as e:
            assert e.rcvd is not None and e.rcvd.code in (1002, 1003, 1007, 1009), f"closed without a reason after {data[:60]!r}"
            outcomes.append("closed")
            connection = None
            continue
        if isinstance(said, bytes): # a mutation may leave a message valid, such as a pixel of another colour
            assert not isinstance(data, str) and np.isfinite(unpack(said)["actions"]).all()
            outcomes.append("answered")
        else:
            assert said and len(said) < 1000 and "Traceback" not in said and 'File "' not in said, said
            outcomes.append("refused")
    if connection: connection.close()


def over_socket(url, rng, n, outcomes):
    "Send n times what is no websocket; each must end in a response or the end of the connection, in time."
    port = int(url.split(":")[-1])
    upgrade = (f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
               "Sec-WebSocket-Version: 13\r\n{}\r\n").format
    for _ in range(n):
        after_upgrade = rng.choice([b"\xff"*20, b"\x82\x7f" + b"\xff"*8, b"\x82\x05hello", b"\x83\x80\0\0\0\0", b"\xf2\x80\0\0\0\0", b"\x89\xfe\x01\x00" + bytes(260), b"\x81\x82\0\0\0\0\xff\xff", b"\x88\x82\0\0\0\0\0\0"])
        first = rng.choice([rng.randbytes(rng.randint(1, 200)) + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"GET / HTTP/0.9\r\n\r\n", b"GET /" + b"a"*20_000 + b" HTTP/1.1\r\n\r\n",
                            b"GET / HTTP/1.1\r\n" + b"X: y\r\n"*500 + b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                            upgrade("Authorization: Api-Key wrong\r\n").encode(), upgrade("Authorization: Api-Key secret\r\nOrigin: http://evil\r\n").encode(), upgrade("Authorization: Api-Key secret\r\nSec-WebSocket-Version: 7\r\n").encode(),
                            upgrade("Authorization: Api-Key wrong\r\nAuthorization: Basic x\r\n").encode(), upgrade("").encode(), upgrade("Authorization: Api-Key secret\r\n").encode() + after_upgrade])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            try:
                connection.sendall(first)
                if not first.endswith(after_upgrade): connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536): pass # until the server ends it; a timeout fails the test
            except (ConnectionResetError, BrokenPipeError): pass # it ended it before it had read all
        outcomes.append("ended")


def test_ten_thousand_wrong_requests(tmp_path):
    "None stops the server, none is left without an answer, and afterwards a right request is answered as before."
    encoders = load_encoders("tiny")
    policy = PlainPolicy(PlainConfig.tiny(), encoders) # it needs all that a request can bring
    save_checkpoint(tmp_path, policy, info=model_info(policy, encoders, preset="tiny"))
    with command(str(tmp_path), "--clients", "40", "--max-mb", "1", "--batch", "1", "--device", "cpu", DEFI_NB_KEY="secret") as (process, url):
        threading.Thread(target=process.stdout.read, daemon=True).start() # or its words would fill the pipe
        with Client(url, "secret") as client: before = client.infer(observation())["actions"]
        outcomes, memory = [], psutil.Process(process.pid).memory_info().rss
        jobs = [(over_websocket, random.Random(k), 2250) for k in range(4)] + [(over_socket, random.Random(k), 250) for k in range(4, 8)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            for future in [pool.submit(job, url, rng, n, outcomes) for job, rng, n in jobs]: future.result(timeout=500)
        with Client(url, "secret") as client: np.testing.assert_array_equal(client.infer(observation())["actions"], before)
        counts = {kind: outcomes.count(kind) for kind in sorted({*outcomes})}
        assert len(outcomes) == 10_000 and process.poll() is None, counts
        assert counts["refused"] > 7000 and counts["ended"] == 1000 and counts["closed"] > 5, counts
        grown = (psutil.Process(process.pid).memory_info().rss - memory)/2**20
        assert grown < 100, f"{grown:.0f} MiB more than before"
        process.terminate()
        assert process.wait(30) == 0
        print(counts, f"{grown:.1f} MiB more than before")


# the vla-eval harness

BENCHMARK = '''
"The embedded simulator as a benchmark of vla-eval, in the manner of its CALVIN: two episodes of two subtasks of seven steps."
import json
import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import GRIPPER_CLOSE_NEG, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_EULER
from defi_nb.sim.playtable import PlayTable

class Embedded(StepBenchmark):
    render_backends = frozenset({"gpu", "cpu"})

    def __init__(self, out="", send_wrist_image=False):
        super().__init__()
        self.out, self.wrist, self.env = out, send_wrist_image, PlayTable("D", static_size=32, gripper_size=32)

    def get_tasks(self): return [{"name": f"chain {i}", "seq_idx": i} for i in range(2)]
    def get_metadata(self): return {"max_steps": 14}
    def cleanup(self): self.env.close()

    def reset(self, task):
        self.steps, self.task = 0, task
        obs = self.env.reset()
        self.home = obs["robot_obs"][:3].copy()
        return obs

    def step(self, action):
        action, self.steps = np.asarray(action["actions"], float), self.steps + 1
        with open(self.out, "a") as file: file.write(json.dumps([self.task["seq_idx"], self.steps, action.tolist()]) + "\\n")
        obs = self.env.step(action/np.array([.02]*3 + [.05]*3 + [1]))[0]
        return StepResult(obs=obs, reward=0., done=self.steps == 14, info={"success": bool(np.linalg.norm(obs["robot_obs"][:3] - self.home) > .001)})

    def make_obs(self, obs, task):
        views = ("static", "gripper") if self.wrist else ("static",)
        seen = {"images": {f"rgb_{v}": np.ascontiguousarray(obs["rgb_obs"][f"rgb_{v}"]) for v in views}, "task_description": "open the drawer" if self.steps < 7 else "close the drawer"}
        return seen | ({"episode_restart": True} if self.steps == 7 else {})

    def get_step_result(self, result): return {"success": result.info["success"]}
    def get_action_spec(self): return {"position": POSITION_DELTA, "rotation": ROTATION_EULER, "gripper": GRIPPER_CLOSE_NEG}
    def get_observation_spec(self): return {"rgb_static": IMAGE_RGB, "language": LANGUAGE}
'''


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


@pytest.mark.parametrize("shards", [1, 2])
def test_vla_eval_harness(tmp_path, shards):
    "Its own program plays episodes in the embedded simulator against our model server; shards do not change the actions."
    pytest.importorskip("vla_eval")
    from defi_nb.eval.rollout import RandomPolicy
    from defi_nb.serve.inference import Request, answer, contract_of
    from defi_nb.serve.vla_eval import harness_actions, task_number
    (tmp_path/"standin.py").write_text(BENCHMARK)
    port = free_port()
    (tmp_path/"eval.yaml").write_text(f"""server: {{url: "ws://127.0.0.1:{port}"}}
output_dir: "{tmp_path/'results'}"
benchmarks:
  - benchmark: "standin:Embedded"
    episodes_per_task: 1
    params: {{out: "{tmp_path/'actions.jsonl'}"}}
""")
    code = "from defi_nb.serve.vla_eval import main; raise SystemExit(main())"
    with subprocess.Popen([sys.executable, "-c", code, "random", "--port", str(port), "--execute", "5", "--seed", "3"], stdout=subprocess.PIPE, text=True, env=ENV) as server:
        try:
            assert " for vla-eval at ws://127.0.0.1:" in server.stdout.readline()
            threading.Thread(target=server.stdout.read, daemon=True).start()
            env = ENV | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ENV.get("PYTHONPATH", "")])}
            for shard in range(shards):
                sharded = ["--shard-id", shard, "--num-shards", shards, "--eval-id", "one"] if shards > 1 else []
                done = subprocess.run([sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "--yes", "--config", tmp_path/"eval.yaml", *map(str, sharded)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stdout + done.stderr
        finally: server.kill()
    rows = [json.loads(line) for line in (tmp_path/"actions.jsonl").read_text().splitlines()]
    assert len(rows) == 28 and "mismatch" not in (done.stdout + done.stderr).lower()
    policy = RandomPolicy()
    contract, seen = contract_of(policy), Request({"static": np.zeros((8, 8, 3), np.uint8)}, None, "x", False, None)
    for i in range(2):
        number = task_number({"task": {"name": f"chain {i}", "seq_idx": i, "episode_idx": 0}})
        looks = [(3, number, 0, 0), (3, number, 0, 1), (3, number, 1, 0), (3, number, 1, 1)] # the subtask begins after 7 of 10 actions
        chunks = [harness_actions(a, contract) for a in answer(policy, contract, [seen]*4, looks)]
        expected = np.concatenate([chunks[0][:5], chunks[1][:2], chunks[2][:5], chunks[3][:2]])
        np.testing.assert_array_equal(np.array([a for episode, _, a in rows if episode == i], np.float32), expected)
    if shards == 1:
        found = [json.loads(p.read_text()) for p in (tmp_path/"results").rglob("*.json")]
        assert any("mean_success" in json.dumps(f) for f in found), found
