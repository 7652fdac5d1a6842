"""Push and pull against a double of the Hub: what is sent, what is refused, what a failure leaves."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFType

from finetune import hub_client
from finetune.cli import main
from finetune.errors import BadInputError, FinetuneError
from finetune.export.hub import check_access, push
from finetune.export.hub_contents import collect
from finetune.export.hub_provenance import check_fingerprints, load_provenance
from finetune.export.hub_publish import PushOptions, check_push, push_recipe, push_run
from finetune.recipe.hub_address import resolve_repo
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import HubSection
from finetune.training.train import prepare_job
from tests.export.push_run import CANARIES, TOKEN, build_run, hub, write_empty_gguf
from tests.hub_double import SIGNATURE, HubDouble, User
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

assert hub  # a fixture
Capture = pytest.CaptureFixture[str]
REPO = "acme/tickets"
FILES = {"a.json": b"{}", "b.safetensors": b"weights " * 4096}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return build_run(tmp_path_factory.mktemp("finished"), base)


@pytest.fixture
def run(finished: tuple[Path, Any]) -> Path:
    return finished[0]


def num_commits(double: HubDouble, name: str = REPO) -> int:
    """Commits of clients: the Hub makes the first itself."""
    return len(double.repositories["models", name].commits) - 1


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_push_is_one_private_commit_of_everything(hub: HubDouble, run: Path, capsys: Capture) -> None:
    before = snapshot(run)
    assert main(["push", str(run), REPO, "--message", "Hello"]) == 0
    assert hub.repositories["models", REPO].private
    assert num_commits(hub) == 1 == len(hub.sent(f"POST /api/models/{REPO}/commit/"))
    assert hub.repositories["models", REPO].commits[-1].title == "Hello"
    pushed = hub.files(REPO)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(pushed)
    assert {"recipe.yaml", "fingerprints.json", "README.md", "loss.svg"} <= set(pushed)
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert pushed[name] == (run / "adapter" / name).read_bytes()
    assert json.loads(pushed["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads(pushed["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", "0" * 40)
    # Nothing on disk is changed, and the same again is no commit.
    assert snapshot(run) == before
    assert main(["push", str(run), REPO]) == 0
    assert "already holds exactly this" in capsys.readouterr().err
    assert num_commits(hub) == 1


def test_fm30_no_canary_is_in_a_request_a_file_or_an_output(hub: HubDouble, run: Path, capsys: Capture) -> None:
    hub.fail(r"PUT /lfs-storage", 403)
    assert main(["push", str(run), REPO]) == 1
    assert main(["push", str(run), REPO]) == 0
    out, err = capsys.readouterr()
    sent = [f"{one.path} {one.headers} {one.body.decode(errors='replace')}" for one in hub.requests]
    files = [content.decode(errors="replace") for content in hub.files(REPO).values()]
    for canary in CANARIES:
        assert not any(canary in text for text in [*sent, *files, out, err]), canary
    assert SIGNATURE not in out + err
    # The token goes to the Hub as what it is for, and not to the storage.
    assert all(one.authorization is None for one in hub.sent("PUT /lfs-storage"))


def test_a_token_in_a_recipe_is_not_pushed(hub: HubDouble, base: Path, tmp_path: Path) -> None:
    run, _ = build_run(tmp_path, base, data={"sources": [{"path": "acme/rows"}], "system": f"Use {TOKEN}."})
    with pytest.raises(BadInputError, match=r"recipe\.yaml holds what looks like a token") as caught:
        push_run(run, REPO)
    assert TOKEN not in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "user", "repo", "said"),
    [
        (None, None, REPO, r"not logged in.*hf auth login.*HF_TOKEN"),
        ("hf_wrongwrongwrongwrong", None, REPO, "401.*token was not accepted.*hf auth login"),
        (TOKEN, User("ada"), REPO, r"no member of acme; push to one of: ada"),
        (TOKEN, User("ada", orgs={"acme": "read"}), REPO, r"may only read in acme"),
        (TOKEN, User("ada", role="read"), "ada/x", r"the token of ada may only read"),
        (TOKEN, User("ada", role="fineGrained", orgs={"acme": "write"}, grants=("ada",)), REPO, "no right to write"),
        (TOKEN, User("eve"), "acme/held", "403.*eve may not write to acme/held"),
    ],
)
def test_nothing_is_sent_before_access_is_sure(
    hub: HubDouble,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    user: User | None,
    repo: str,
    said: str,
) -> None:
    hub.add_repository("acme/held", {"x": b"x"})
    hub.users.clear()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run / "no-such-file"))
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    if token is not None and user is not None:
        hub.users[token] = user
    for attempt in (lambda: push_run(run, repo), lambda: check_push(HubSection(repo_id=repo), run)):
        with pytest.raises(FinetuneError, match=rf"(?s){said}.*Everything is kept here.*finetune push") as caught:
            attempt()
        assert caught.value.exit_code == 1
    assert {one.method for one in hub.requests} <= {"GET"}
    assert ("models", REPO) not in hub.repositories


def test_check_access_creates_nothing(hub: HubDouble) -> None:
    access = check_access(REPO)
    assert (access.user, access.exists) == ("ada", False)
    hub.users[TOKEN] = User("ada", role="fineGrained", orgs={"acme": "write"}, grants=("acme",))
    hub.add_repository(REPO, {"README.md": b"mine"}, private=True)
    access = check_access(REPO)
    assert (access.exists, access.private, access.files) == (True, True, ("README.md",))
    assert {one.method for one in hub.requests} == {"GET"}
    # A mirror that does not know the question about writing.
    hub.fail("auth-check", 404)
    assert check_access(REPO).exists
    with pytest.raises(BadInputError, match="ORG/NAME"):
        check_access("tickets")


def test_other_content_needs_overwrite(hub: HubDouble, run: Path, capsys: Capture) -> None:
    hub.add_repository(REPO, {"adapter_model.safetensors": b"other", "old.txt": b"old"}, private=True)
    assert main(["push", str(run), REPO]) == 2
    assert "already holds other content (adapter_model.safetensors, old.txt)" in capsys.readouterr().err
    assert num_commits(hub) == 1
    assert main(["push", str(run), REPO, "--overwrite"]) == 0
    assert num_commits(hub) == 2
    assert "old.txt" not in hub.files(REPO)
    assert hub.files(REPO)["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()


def test_an_empty_repository_needs_no_flag(hub: HubDouble) -> None:
    hub.add_repository(REPO, {}, private=True)
    assert push(FILES, REPO).changed
    assert hub.files(REPO) == FILES


def test_public_only_when_asked(hub: HubDouble) -> None:
    push(FILES, REPO, public=True)
    assert not hub.repositories["models", REPO].private
    with pytest.raises(BadInputError, match="is public; add --public"):
        push(FILES, REPO)
    push(FILES, "acme/other")
    assert hub.repositories["models", "acme/other"].private
    push(FILES, "acme/other", public=True)
    assert not hub.repositories["models", "acme/other"].private


STEPS = (
    "GET /api/whoami-v2",
    f"GET /api/models/{REPO}$",
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    f"POST /api/models/{REPO}/preupload",
    "objects/batch",
    "PUT /lfs-storage",
    "POST /lfs-verify",
    f"POST /api/models/{REPO}/commit",
)
FAULTS: dict[str, Callable[[HubDouble, str], None]] = {
    "500": lambda double, step: double.fail(step, 500, times=2),
    "429": lambda double, step: double.fail(step, 429, **{"Retry-After": "3"}),
    "cut": lambda double, step: double.cut(step),
    "lost": lambda double, step: double.lose(step),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS)
def test_what_passes_is_tried_again_and_ends_in_one_commit(hub: HubDouble, step: str, fault: str) -> None:
    FAULTS[fault](hub, step)
    push({**FILES, "README.md": b"---\ntags: [x]\n---\n"}, REPO)
    assert all(one.times == 0 for one in hub.faults), "the fault did not happen"
    assert hub.files(REPO).keys() == {*FILES, "README.md"}
    assert num_commits(hub) == 1
    assert hub.repositories["models", REPO].private


@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may not write"), (404, "check the name")])
def test_what_does_not_pass_is_said_at_once(hub: HubDouble, run: Path, step: str, status: int, said: str) -> None:
    before = snapshot(run)
    hub.fail(step, status, times=99)
    with pytest.raises(FinetuneError, match=rf"(?s){status}.*{said}.*Everything is kept here. Next: finetune push"):
        push_run(run, REPO)
    assert len(hub.sent(step)) == 1
    assert snapshot(run) == before
    hub.faults.clear()
    push_run(run, REPO)
    assert num_commits(hub) == 1


@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict_is_said(hub: HubDouble, status: int) -> None:
    hub.fail("/commit/", status)
    with pytest.raises(FinetuneError, match=f"{status}.*then push again"):
        push(FILES, REPO)
    push(FILES, REPO)
    hub.fail("/repos/create", 409)
    with pytest.raises(FinetuneError, match="409"):
        push(FILES, "acme/new")


def test_a_commit_by_someone_else_meanwhile_is_not_overwritten(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repository(REPO, {}, private=True)
    repository = hub.repositories["models", REPO]
    find, preupload = repository.find, f"POST /api/models/{REPO}/preupload"

    def find_late(revision: str) -> Any:
        """Theirs arrives after we have looked and before we commit."""
        if hub.sent(preupload) and len(repository.commits) == 1:
            repository.add("theirs", {"theirs.txt": hub.store(b"x", "theirs.txt")})
        return find(revision)

    monkeypatch.setattr(repository, "find", find_late)
    with pytest.raises(FinetuneError, match=r"412: .* was changed while this push was under way"):
        push(FILES, REPO)
    assert hub.files(REPO) == {"theirs.txt": b"x"}


def test_a_server_that_stays_down_is_given_up_with_the_next_command(hub: HubDouble, run: Path) -> None:
    hub.fail(".", 503, times=10**6)
    with pytest.raises(FinetuneError, match=rf"503.*try again later\n.*finetune push {run} {REPO} --overwrite"):
        push_run(run, REPO, PushOptions(overwrite=True))
    assert len(hub.requests) == 1 + len(hub_client.WAITS)


def test_a_silent_server_is_not_waited_for_for_ever(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "TIMEOUT_SECONDS", 0.2)
    hub.stall("whoami")
    assert check_access(REPO).user == "ada"
    assert len(hub.sent("whoami")) == 2


def test_dry_run_lists_files_and_sizes_and_asks_nobody(hub: HubDouble, run: Path, capsys: Capture) -> None:
    assert main(["push", str(run), REPO, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    size = (run / "adapter/adapter_model.safetensors").stat().st_size
    assert any(line.split() == ["adapter_model.safetensors", f"{size:,}"] for line in out.splitlines())
    assert "README.md" in out and "total" in out and "private" in err
    assert not hub.requests


def test_a_local_base_is_warned_about_and_named_without_its_path(
    hub: HubDouble, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, _ = build_run(tmp_path, base, name=str(base))
    assert main(["push", str(run), REPO]) == 0
    assert "warning: the base model is a local directory" in capsys.readouterr().err
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == f"./{base.name}"
    assert not any(str(base).encode() in content for content in hub.files(REPO).values())


@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        ("package://pack/x.gguf", "package://pack/x.gguf"),
        (f"/cache/models--acme--base/snapshots/{'1' * 40}", "acme/base"),
    ],
)
def test_names_of_other_bases(base: Path, tmp_path: Path, name: str, pushed: str) -> None:
    run, _ = build_run(tmp_path, base, name=name)
    contents = collect(run)
    config = json.loads(contents.files["adapter_config.json"])  # type: ignore[arg-type]
    assert config["base_model_name_or_path"] == pushed
    assert bool(contents.warnings) == name.startswith("package")
    assert config["revision"] == (None if name.startswith("package") else "1" * 40)


def test_rank_patterns_are_pushed_in_their_order(base: Path, tmp_path: Path) -> None:
    patterns = {r"layers\.1\.self_attn\.q_proj": 8, r".*q_proj": 2}  # sorted, PEFT would take 2 for both
    lora = {"rank": 4, "target_modules": ["q_proj"], "rank_pattern": patterns, "alpha_pattern": patterns}
    run, _ = build_run(tmp_path, base, adapter=lora)
    config = json.loads(collect(run).files["adapter_config.json"])  # type: ignore[arg-type]
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for name in ("rank_pattern", "alpha_pattern"):
        assert list(config[name]) == list(saved[name]) != sorted(saved[name])


def test_the_merged_model_and_a_gguf_file_are_pushed_alone(
    hub: HubDouble, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, _ = build_run(tmp_path, base)
    assert main(["push", str(run), REPO, "--merged"]) == 2
    assert "finetune merge" in capsys.readouterr().err
    assert main(["push", str(run), REPO, "--gguf", str(tmp_path / "none.gguf")]) == 2
    (run / "merged").mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / "merged" / name).write_bytes((base / name).read_bytes())
    (run / "merged" / "UNUSABLE.md").write_text("drift")
    assert main(["push", str(run), "acme/merged", "--merged"]) == 2
    assert "its check failed" in capsys.readouterr().err
    (run / "merged" / "UNUSABLE.md").unlink()
    (run / "merged" / "merge.json").write_text(json.dumps({"usable": True, "base_model": {"name": "/home/me/base"}}))
    assert main(["push", str(run), "acme/merged", "--merged"]) == 0
    record = json.loads(hub.files("acme/merged")["merge.json"])
    assert record == {"usable": True, "base_model": {"name": "acme/base", "revision": "0" * 40}}
    assert "adapter_config.json" not in hub.files("acme/merged")
    assert hub.files("acme/merged")["model.safetensors"] == (base / "model.safetensors").read_bytes()
    write_empty_gguf(tmp_path / "x.gguf", GGUFType.MODEL)
    assert main(["push", str(run), "acme/gguf", "--gguf", str(tmp_path / "x.gguf")]) == 0
    assert {"x.gguf", "README.md", "recipe.yaml"} <= set(hub.files("acme/gguf"))


def test_a_place_without_an_adapter_is_named(hub: HubDouble, tmp_path: Path, capsys: Capture) -> None:
    assert main(["push", str(tmp_path), REPO]) == 2
    assert "holds no finished adapter" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "none"), REPO]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert not hub.requests


def test_the_recipe_names_the_repository_unless_the_command_does(
    hub: HubDouble, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, _ = build_run(tmp_path, base)
    assert main(["push", str(run)]) == 2
    assert "hub.repo_id" in capsys.readouterr().err
    other, _ = build_run(tmp_path / "other", base, hub={"repo_id": REPO})
    assert main(["push", str(other)]) == 0
    assert num_commits(hub) == 1


def test_check_push_warns_of_other_content(hub: HubDouble, run: Path, capsys: Capture) -> None:
    hub.add_repository(REPO, {"x": b"x"})
    check_push(HubSection(repo_id=REPO, private=False), run)
    assert "--overwrite replaces them" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(BadInputError, match=r"is public, and hub\.private is true"):
        check_push(HubSection(repo_id=REPO), run)


def test_a_run_publishes_only_where_its_recipe_says_so(hub: HubDouble, run: Path) -> None:
    push_recipe(HubSection(repo_id=REPO), run)
    push_recipe(HubSection(repo_id="acme/open", private=False), run)
    assert hub.repositories["models", REPO].private and not hub.repositories["models", "acme/open"].private


def test_a_pushed_recipe_holds_no_path_of_this_machine(hub: HubDouble, run: Path, tmp_path: Path) -> None:
    push_run(run, REPO)
    recipe = yaml.safe_load(hub.files(REPO)["recipe.yaml"])
    assert [source["path"] for source in recipe["data"]["sources"]] == ["./train.jsonl", "acme/rows"]
    assert recipe["output_dir"] == "runs"
    assert (recipe["model"]["name"], recipe["model"]["revision"]) == ("acme/base", "0" * 40)


def test_resolve_repo(hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first = hub.add_repository(REPO, {"adapter_config.json": b"{}", "model.safetensors": b"large"}, private=True)
    folder = resolve_repo(f"hf://{REPO}", endpoint=hub.url)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json"}
    hub.repositories["models", REPO].add("empty", {})
    assert resolve_repo(f"hf://{REPO}@{first.oid}", endpoint=hub.url) == folder
    for wrong in ("hf://tickets", "hf://datasets/acme/rows", "hf://acme/x@"):
        with pytest.raises(BadInputError, match="hf://ORG/NAME@REVISION"):
            resolve_repo(wrong)
    with pytest.raises(FinetuneError, match=r"404.*check the name"):
        resolve_repo("hf://acme/none", endpoint=hub.url)
    with pytest.raises(FinetuneError, match="404"):
        resolve_repo(f"hf://{REPO}@nowhere", endpoint=hub.url)


def test_provenance_of_a_pushed_run(
    hub: HubDouble, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    push_run(run, REPO)
    given = f"hf://{REPO}"
    with pytest.raises(
        BadInputError, match=rf"data\.sources\.0\.path.*finetune run {given} data\.sources\.0\.path=PATH"
    ):
        load_provenance(given, endpoint=hub.url)
    for key in ("data.sources.0.path", "data.sources[0].path", "data . sources [0] . path"):
        own = [f"{key}=/elsewhere/rows.jsonl"]
        found = load_provenance(given, own, endpoint=hub.url)
        assert load_recipe(found.recipe, [*found.overrides, *own]).data.sources[0].path == "/elsewhere/rows.jsonl"
    (tmp_path / "train.jsonl").write_text("{}\n")
    found = load_provenance(given, endpoint=hub.url)
    recipe = load_recipe(found.recipe, found.overrides)
    assert recipe.data.sources[0].path == str(tmp_path / "train.jsonl")
    assert recipe.model.revision == "0" * 40
    assert (recipe.name, recipe.hub.push) == ("canary-run-again", False)
    # The same, and what differs.
    same = json.loads((run / "adapter/fingerprints.json").read_text())
    check_fingerprints(found, same)
    assert "base and data are those of hf://" in capsys.readouterr().err
    other = {"base": {**same["base"], "sha256": "ef" * 32}, "data": {**same["data"], "train": "12" * 32}}
    with pytest.raises(
        BadInputError, match=r"(?s)base model: acme/base at 0{12}.*training data: .*cdcdcd.* then, 1212"
    ):
        check_fingerprints(found, other, ["training.max_steps=3"])
    check_fingerprints(found, other, ["data.max_seq_len=64"])
    assert "It goes on" in capsys.readouterr().err


def test_provenance_of_a_directory(run: Path, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    local, _ = build_run(tmp_path, base, name=str(base), data={"sources": [{"path": str(data)}]})
    for given in (local, local / "adapter"):
        found = load_provenance(str(given))
        recipe = load_recipe(found.recipe, found.overrides)
        assert (recipe.model.name, recipe.data.sources[0].path) == (str(base), str(data))
        assert found.fingerprints["base"]["sha256"]


@pytest.mark.slow
def test_a_run_made_again_from_the_hub_gives_the_same_bytes(
    hub: HubDouble, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Train, push, and train again from what was pushed: base and data are found here by name, and are the same."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    data = write_jsonl(here / "rows.jsonl", alpaca_rows(24, longest=4))
    (here / "base").symlink_to(base)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, here / "base", data))
    assert main(["run", str(recipe)]) == 0
    first = tmp_path / "runs" / "tiny"
    push_run(first, REPO)
    assert b"pytest" not in hub.files(REPO)["recipe.yaml"]
    monkeypatch.chdir(here)
    found = load_provenance(f"hf://{REPO}", endpoint=hub.url)
    again = load_recipe(found.recipe, found.overrides)
    check_fingerprints(found, prepare_job(again).fingerprints)
    assert main(["run", str(found.recipe), *found.overrides]) == 0
    second = here / "runs" / "tiny-again"
    name = "adapter_model.safetensors"
    assert (first / "adapter" / name).read_bytes() == (second / "adapter" / name).read_bytes()
    # Other data is noticed before any step.
    write_jsonl(data, alpaca_rows(24, seed=1, longest=4))
    with pytest.raises(BadInputError, match="training data: samples of hash"):
        check_fingerprints(found, prepare_job(again).fingerprints)


FRESH = """
import json, sys
run, repo, home = sys.argv[1:]
from finetune.cli import main
assert main(["push", run, repo]) == 0
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from finetune.recipe.hub_address import resolve_repo
ids = torch.tensor([[1, 7, 9, 30, 4]])
tokenizer = AutoTokenizer.from_pretrained(repo)
messages = [{"role": "user", "content": "count the boats"}]
with torch.no_grad():
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("acme/base"), repo).eval()(ids).logits
    two = AutoPeftModelForCausalLM.from_pretrained(repo).eval()(ids).logits
    bare = AutoModelForCausalLM.from_pretrained("acme/base").eval()(ids).logits
from datasets import load_dataset
rows = load_dataset("acme/rows", split="train")
torch.save([one, two, bare], home + "/logits.pt")
print(json.dumps({
    "prompt": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
    "files": sorted(path.name for path in resolve_repo("hf://" + repo).iterdir()),
    "rows": [row["instruction"] for row in rows],
}))
"""


@pytest.mark.slow
def test_fm12_a_fresh_process_pulls_what_was_pushed(
    base: Path, tmp_path: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Push, then pull with PEFT's two loaders, private base and adapter: the logits and the prompt of this process."""
    commit = hub.add_repository("acme/base", base, private=True)
    monkeypatch.setattr("tests.export.push_run.BASE_COMMIT", commit.oid)
    hub.add_repository(
        "acme/rows", {"train.jsonl": b'{"instruction": "a"}\n{"instruction": "b"}\n'}, kind="datasets", private=True
    )
    run, model = build_run(tmp_path, base)
    environment = hub.environment(TOKEN, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(run), REPO, str(tmp_path)],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES)
    said = json.loads(done.stdout.splitlines()[-1])
    one, two, bare = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        want = model(torch.tensor([[1, 7, 9, 30, 4]])).logits
    assert torch.equal(one, want) and torch.equal(two, want)
    assert not torch.allclose(bare, want, atol=1e-2)
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "count the boats"}]
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert said["prompt"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert {"adapter_model.safetensors", "recipe.yaml", "fingerprints.json"} <= set(said["files"])
    assert said["rows"] == ["a", "b"]


def test_the_double_knows_branches_tags_and_deletion(hub: HubDouble) -> None:
    from huggingface_hub import HfApi

    commit, api = push(FILES, REPO).commit, HfApi(endpoint=hub.url)
    api.create_branch(REPO, branch="work")
    api.create_tag(REPO, tag="v1")
    assert {ref.target_commit for ref in api.list_repo_refs(REPO).branches} == {commit}
    assert api.model_info(REPO, revision="v1").sha == commit
    assert api.list_repo_commits(REPO)[0].commit_id == commit
    assert [one.path for one in api.get_paths_info(REPO, ["a.json"])] == ["a.json"]
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_options_give_back_their_command_line() -> None:
    from finetune.commands.push import configure

    options = PushOptions(gguf=Path("a b.gguf"), public=True, overwrite=True, message="it's")
    parser = argparse.ArgumentParser()
    configure(parser)
    import shlex

    parsed = parser.parse_args(shlex.split(options.command(Path("runs/x"), REPO))[2:])
    assert (parsed.gguf, parsed.public, parsed.overwrite, parsed.message) == (Path("a b.gguf"), True, True, "it's")
