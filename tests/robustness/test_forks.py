"""A fork has the memory of its parent's communicators, but none of the threads that they need."""

from own_processes import starts_its_own_processes
from subprocesses import run_python

pytestmark = starts_its_own_processes


def test_a_fork_frees_and_closes_what_it_has_inherited() -> None:
    """As a worker of a data loader may: it does not hang, and the parent's communicators are unharmed."""
    printed = run_python("""
    import gc, warnings
    def make():
        return ep.Communicator(mesh_named("data × expert"), "expert", num_experts=8, num_experts_per_tok=1,
                               max_tokens=8, hidden_size=8, implementation="native")
    kept, dropped = make(), [make()]
    warnings.simplefilter("ignore")  # JAX warns of forks
    if (child := os.fork()) == 0:
        dropped.clear()
        gc.collect()
        try:
            kept.check()
        except ep.CommunicatorError as error:
            print(error, flush=True)
        kept.close()
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    kept.check()
    kept.close()
    """)
    assert "belongs to process" in printed
    assert "make a new one here, or start processes with spawn" in printed
