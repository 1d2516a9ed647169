"""A tenant's module in which every function attacks. It returns where the attack works, and raises where not.

Shipped as source into isolates with and without walls; `about` is what the test knows of the host.
"""

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def syscall(*args):
    result = libc.syscall(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- files ---


def read_the_hosts_passwd(about):
    return open("/etc/passwd").read()[:1]


def read_a_file_of_the_test(about):
    return open(about["file"]).read()


def read_the_platforms_own_code(about):
    return open(about["code"]).read(1)


def list_the_folder_of_another_tenant(about):
    return os.listdir(about["folder"])


def write_into_a_folder_that_anybody_may_write(about):
    with open(about["folder"] + "/written", "w") as file:
        file.write("x")
    return True


def create_a_file_beside_the_standard_library(about):
    path = os.path.join(os.path.dirname(os.__file__), "dynflow_probe_%d" % os.getpid())
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
    return True


def create_a_file_in_tmp(about):
    path = "/tmp/dynflow_probe_%d" % os.getpid()
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
    return True


def read_the_other_packages_of_the_host(about):
    return os.listdir(about["packages"])[0]


def climb_out_with_chroot(about):
    os.chroot("/")
    return True


# --- other processes ---


def list_the_hosts_processes(about):
    return next(name for name in os.listdir("/proc") if name == str(about["pid"]))


def read_the_hosts_environment(about):
    return open("/proc/%d/environ" % about["pid"], "rb").read(1)


def read_the_parents_memory_map(about):
    return open("/proc/%d/maps" % os.getppid()).read(1)


def signal_the_host(about):
    os.kill(about["pid"], 0)
    return True


def let_oneself_be_traced(about):
    return syscall(about["nr"]["ptrace"], 0, 0, 0, 0) == 0


def read_the_memory_of_another_process(about):
    buffer = ctypes.create_string_buffer(8)
    pointer = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    target = about["pid"] if os.getpid() == 1 else os.getpid()
    return syscall(about["nr"]["process_vm_readv"], target, pointer, 1, pointer, 1, 0)


def open_a_handle_of_a_process(about):
    return syscall(about["nr"]["pidfd_open"], os.getpid(), 0)


# --- network ---


def connect_to_the_host(about):
    with socket.create_connection(("127.0.0.1", about["port"]), timeout=5):
        return True


def make_a_datagram_socket(about):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    return True


def make_a_netlink_socket(about):
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    return True


def connect_to_an_abstract_socket_of_the_host(about):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + about["abstract"])
        return True


def connect_to_a_socket_in_the_file_system(about):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(about["socket"])
        return True


def make_a_socketpair(about):
    left, right = socket.socketpair()
    left.close()
    right.close()
    return True


# --- more processes, more code ---


def fork(about):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def run_a_program(about):
    return subprocess.run(["/bin/true"]).returncode == 0


def start_a_thread(about):
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    return True


def map_memory_that_can_be_executed(about):
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    return True


def make_memory_executable(about):
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return libc.mprotect(ctypes.c_void_p(address), 4096, 7) == 0 or 1 / 0


def make_an_anonymous_file_to_execute(about):
    return os.memfd_create("x") > 0


# --- the kernel ---


def enter_a_new_user_namespace(about):
    if os.fork() == 0:  # in a child: the process itself shall stay what it is
        code = libc.unshare(0x10000000)
        os._exit(0 if code == 0 else 1)
    return os.wait()[1] == 0


def unshare_in_place(about):
    return syscall(about["nr"]["unshare"], 0x04000000) == 0


def enter_a_namespace(about):
    return syscall(about["nr"]["setns"], os.open("/proc/self/ns/uts", os.O_RDONLY), 0) == 0


def mount_something(about):
    if libc.mount(b"none", about["folder"].encode(), b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    libc.umount2(about["folder"].encode(), 2)
    return True


def set_the_host_name(about):
    name = os.uname().nodename.encode()
    return libc.sethostname(name, len(name)) == 0 or 1 / 0


def use_the_keyring(about):
    return syscall(about["nr"]["keyctl"], 0, -3, 1)


def add_a_key(about):
    return syscall(about["nr"]["add_key"], b"user", b"dynflow-probe", b"x", 1, -2)


def set_up_io_uring(about):
    return syscall(about["nr"]["io_uring_setup"], 1, ctypes.create_string_buffer(120))


def handle_page_faults(about):
    return syscall(about["nr"]["userfaultfd"], 1)


def load_a_bpf_program(about):
    # BPF_MAP_CREATE of an array map with one entry.
    attributes = (ctypes.c_uint32 * 18)(2, 4, 4, 1)
    return syscall(about["nr"]["bpf"], 0, attributes, 72)


def watch_performance_counters(about):
    attributes = ctypes.create_string_buffer(128)
    attributes[0:8] = (1).to_bytes(4, "little") + (128).to_bytes(4, "little")
    return syscall(about["nr"]["perf_event_open"], attributes, 0, -1, -1, 0)


def share_system_v_memory(about):
    identifier = syscall(about["nr"]["shmget"], 0, 4096, 0o1600)
    syscall(about["nr"]["shmctl"], identifier, 0, 0)
    return True


def change_ones_personality(about):
    return syscall(about["nr"]["personality"], 0xFFFFFFFF) >= 0


def become_root(about):
    os.setresuid(0, 0, 0)
    libc.unshare(0x04000000) and 1 / 0
    return True


def raise_ones_own_limits(about):
    soft, hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (soft, hard + 1))
    return True


def change_the_limits_of_another_process(about):
    resource.prlimit(os.getppid() or about["pid"], resource.RLIMIT_CORE, (0, 0))
    return True


def watch_files(about):
    return syscall(about["nr"]["inotify_init1"], 0)


def wait_for_events(about):
    import select

    select.epoll().close()
    return True


# --- what it was given ---


def environment(about):
    return dict(os.environ)


def open_descriptors(about):
    found = []
    for fd in range(256):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    return found


def everything_in_sight(about):
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk("/") for name in names)


def arguments_and_paths(about):
    return [sys.argv, sys.path, sys.executable, os.getcwd()]


# --- denial of service ---


def spin(about):
    while True:
        pass


async def spin_while_claiming_to_wait(about):
    import asyncio

    async def later():
        spin(about)

    asyncio.ensure_future(asyncio.wait_for(later(), 100))
    await asyncio.sleep(100)


def take_memory(about):
    hoard = []
    while True:
        hoard.append(bytearray(1 << 20))


def take_memory_and_hide_it(about):
    hoard = []
    while True:
        try:
            hoard.append(bytearray(1 << 20))
        except MemoryError:
            return len(hoard)


def print_without_end(about):
    while True:
        print("x" * 10_000)


def recurse(about):
    return recurse(about)


def answer_with_a_giant(about):
    return "x" * about["size"]


def crash(about):
    ctypes.string_at(0)


def leave(about):
    os._exit(7)


def ignore_signals(about):
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    return True


def write_to_the_host(about):
    """Send raw bytes on the wire itself."""
    os.write(3, bytes(about["bytes"]))
    spin(about)
