"""System calls that an isolate tries: name, numbers on x86_64 and aarch64 (None: not there), arguments.

The arguments are such that nothing comes of a call that gets through. `also` names what else refuses it with EPERM,
where the filter is not there: only then its absence cannot be seen from the outcome.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

CAPABILITIES = "capabilities"
NOT_TRIED = "it would act on the test itself"


@dataclass(frozen=True)
class Attempt:
    """One call."""

    name: str
    numbers: tuple[int | None, int | None]
    args: tuple[int | str, ...] = (0, 0, 0, 0, 0, 0)
    also: str | None = None

    def call(self) -> list[int | str] | None:
        """Return number and arguments on this machine, None where it has no such call."""
        number = self.numbers[{"x86_64": 0, "aarch64": 1}[os.uname().machine]]
        return None if number is None else [number, *self.args]


def _a(name: str, x86: int | None, arm: int | None, *args: int | str, also: str | None = None) -> Attempt:
    return Attempt(name, (x86, arm), args or (0, 0, 0, 0, 0, 0), also)


_BAD = -1  # no descriptor
_AT = -100  # AT_FDCWD

ATTEMPTS = [
    # sockets and what carries descriptors
    _a("socket(inet)", 41, 198, 2, 1, 0),
    _a("socket(inet6)", 41, 198, 10, 1, 0),
    _a("socket(unix)", 41, 198, 1, 1, 0),
    _a("socket(netlink)", 41, 198, 16, 3, 0),
    _a("socket(packet)", 41, 198, 17, 3, 0, also=CAPABILITIES),
    _a("socket(vsock)", 41, 198, 40, 1, 0),
    _a("socket(alg)", 41, 198, 38, 5, 0),
    _a("socketpair", 53, 199, 1, 1, 0, 0),
    _a("connect", 42, 203, _BAD, 0, 0),
    _a("bind", 49, 200, _BAD, 0, 0),
    _a("listen", 50, 201, _BAD, 0),
    _a("accept4", 288, 242, _BAD, 0, 0, 0),
    _a("sendmsg", 46, 211, _BAD, 0, 0),
    _a("recvmsg", 47, 212, _BAD, 0, 0),
    _a("setsockopt", 54, 208, 3, 1, 2, 0, 0),
    # descriptors
    _a("dup", 32, 23, _BAD),
    _a("fcntl", 72, 25, _BAD, 3, 0),
    _a("ioctl", 16, 29, 3, 0x5412, 0),  # TIOCSTI
    _a("pipe2", 293, 59, 0, 0),
    _a("eventfd2", 290, 19, 0, 0x7FFFFFFF),
    _a("signalfd4", 289, 74, _BAD, 0, 8, 0x7FFFFFFF),
    _a("timerfd_create", 283, 85, 99, 0),
    _a("epoll_create1", 291, 20, 0x7FFFFFFF),
    _a("inotify_init1", 294, 26, 0x7FFFFFFF),
    _a("fanotify_init", 300, 262, 0, 0, also=CAPABILITIES),
    _a("memfd_create", 319, 279, "x", 0x7FFFFFFF),
    _a("memfd_secret", 447, 447, 0x7FFFFFFF),
    # programs, processes, threads
    _a("execve", 59, 221, "/", 0, 0),
    _a("execveat", 322, 281, 3, "", 0, 0, 0x1000),
    _a("fork", 57, None, also=NOT_TRIED),
    _a("vfork", 58, None, also=NOT_TRIED),
    _a("clone", 56, 220, 0x800, 0, 0, 0, 0),  # CLONE_SIGHAND without CLONE_VM
    _a("wait4", 61, 260, -1, 0, 1, 0),
    _a("setsid", 112, 157, also="pid 1 leads a group"),
    _a("setpriority", 141, 140, 0, 0, -20),
    _a("sched_setscheduler", 144, 119, 0, 1, 0),
    _a("sched_setaffinity", 203, 122, 0, 0, 0),
    _a("ioprio_set", 251, 30, 1, 0, 0x2000, also=CAPABILITIES),
    # others' processes
    _a("kill(everybody)", 62, 129, -1, 0),
    _a("kill(the group)", 62, 129, 0, 0),
    _a("tkill", 200, 130, 2, 0),
    _a("tgkill", 234, 131, 2, 2, 0),
    _a("rt_sigqueueinfo", 129, 138, 2, 1, 0),
    _a("pidfd_open", 434, 434, 2, 0),
    _a("pidfd_getfd", 438, 438, _BAD, 0, 0),
    _a("pidfd_send_signal", 424, 424, _BAD, 9, 0, 0),
    _a("ptrace(attach)", 101, 117, 16, 2, 0, 0),
    _a("ptrace(traceme)", 101, 117, 0, 0, 0, 0, also=NOT_TRIED),
    _a("process_vm_readv", 310, 270, 2, 0, 0, 0, 0, 0),
    _a("process_vm_writev", 311, 271, 2, 0, 0, 0, 0, 0),
    _a("process_madvise", 440, 440, _BAD, 0, 0, 0, 0),
    _a("kcmp", 312, 272, 2, 2, 0, 0, 0),
    _a("move_pages", 279, 239, 2, 0, 0, 0, 0, 0),
    _a("migrate_pages", 256, 238, 2, 0, 0, 0),
    _a("prlimit(another)", 302, 261, 2, 4, 0, 0),
    # itself
    _a("prctl(dumpable)", 157, 167, 4, 99, 0, 0, 0),
    _a("prctl(name)", 157, 167, 15, "x", 0, 0, 0),
    _a("seccomp", 317, 277, 99, 0, 0),
    _a("arch_prctl", 158, None, 0x9999, 0),
    _a("personality", 135, 92, 0xFFFFFFFF),
    _a("setuid", 105, 146, 0, also=CAPABILITIES),
    _a("setresuid", 117, 147, 0, 0, 0, also=CAPABILITIES),
    _a("setresgid", 119, 149, 0, 0, 0, also=CAPABILITIES),
    _a("setgroups", 116, 159, 0, 0, also=CAPABILITIES),
    _a("capset", 126, 91, 0, 0),
    _a("capget", 125, 90, 0, 0),
    _a("setitimer", 38, 103, 99, 0, 0),
    _a("timer_create", 222, 107, 99, 0, 0),
    _a("set_tid_address", 218, 96, 0),
    _a("set_robust_list", 273, 99, 0, 0),
    _a("rseq", 334, 293, 0, 0, 0, 0),
    _a("membarrier", 324, 283, 99, 0, 0),
    # memory
    _a("mmap(exec)", 9, 222, 0, 4096, 7, 0x22, -1, 0),
    _a("mmap(exec, high bits)", 9, 222, 0, 4096, (1 << 32) | 5, 0x22, -1, 0),
    _a("mprotect(exec)", 10, 226, 0, 0, 4),
    _a("pkey_mprotect", 329, 288, 0, 0, 4, -1),
    _a("remap_file_pages", 216, 234, 0, 0, 1, 0, 0),
    _a("mlock", 149, 228, 0, 4096, also="RLIMIT_MEMLOCK"),
    _a("mlockall", 151, 230, 3, also="RLIMIT_MEMLOCK"),
    _a("userfaultfd", 323, 282, 0x7FFFFFFF),
    _a("modify_ldt", 154, None, 99, 0, 0),
    _a("shmget", 29, 194, 0, 0, 0),
    _a("msgget", 68, 186, 1, 0),
    _a("semget", 64, 190, 1, 0, 0),
    _a("mq_open", 240, 180, "x", 0, 0, 0),
    # namespaces and mounts
    _a("unshare(user)", 272, 97, 0x10000000),
    _a("unshare(mount)", 272, 97, 0x00020000, also=CAPABILITIES),
    _a("setns", 308, 268, _BAD, 0),
    _a("mount", 165, 40, "none", "/", "tmpfs", 0, 0, also=CAPABILITIES),
    _a("umount2", 166, 39, "/", 2, also=CAPABILITIES),
    _a("pivot_root", 155, 41, "/", "/", also=CAPABILITIES),
    _a("chroot", 161, 51, "/", also=CAPABILITIES),
    _a("open_tree", 428, 428, _AT, "/", 1, also=CAPABILITIES),
    _a("move_mount", 429, 429, 0, "/", 0, "/", 0, also=CAPABILITIES),
    _a("fsopen", 430, 430, "proc", 0, also=CAPABILITIES),
    _a("mount_setattr", 442, 442, _AT, "/", 0, 0, 0),
    _a("open_by_handle_at", 304, 265, _AT, 0, 0),
    _a("name_to_handle_at", 303, 264, _AT, "/", 0, 0, 0),
    # files
    _a("open(write)", 257, 56, _AT, "/x", 1),
    _a("open(create)", 257, 56, _AT, "/x", 0o102),
    _a("open(append)", 257, 56, _AT, "/x", 0o2001),
    _a("open(tmpfile)", 257, 56, _AT, "/", 0o20200002),
    _a("openat2", 437, 437, _AT, "/", 0, 0),
    _a("open, the old call", 2, None, "/x", 0),
    _a("creat", 85, None, "/x", 0),
    _a("mkdirat", 258, 34, _AT, "/x", 0),
    _a("unlinkat", 263, 35, _AT, "/x", 0),
    _a("renameat2", 316, 276, _AT, "/x", _AT, "/y", 0),
    _a("linkat", 265, 37, _AT, "/x", _AT, "/y", 0),
    _a("symlinkat", 266, 36, "/etc", _AT, "/x"),
    _a("mknodat(device)", 259, 33, _AT, "/x", 0o20666, 259),
    _a("fchmodat", 268, 53, _AT, "/x", 0),
    _a("fchownat", 260, 54, _AT, "/x", 0, 0, 0),
    _a("setxattr", 188, 5, "/x", "user.x", "x", 1, 0),
    _a("truncate", 76, 45, "/x", 0),
    _a("pwrite64", 18, 68, _BAD, 0, 0, 0),
    _a("sendfile", 40, 71, _BAD, _BAD, 0, 1),
    _a("splice", 275, 76, _BAD, 0, _BAD, 0, 1, 0),
    _a("vmsplice", 278, 75, _BAD, 0, 0, 0),
    _a("copy_file_range", 326, 285, _BAD, 0, _BAD, 0, 1, 0),
    _a("chdir", 80, 49, "/nowhere"),
    _a("statfs", 137, 43, "/nowhere", 0),
    # the kernel
    _a("keyctl", 250, 219, 0, -3, 0),
    _a("add_key", 248, 217, "user", "x", 0, 0, 0),
    _a("request_key", 249, 218, "user", "x", 0, 0),
    _a("bpf", 321, 280, 99, 0, 0, also=CAPABILITIES),
    _a("perf_event_open", 298, 241, 0, 0, -1, -1, 0),
    _a("io_uring_setup", 425, 425, 0, 0),
    _a("io_uring_enter", 426, 426, _BAD, 0, 0, 0, 0, 0),
    _a("io_uring_register", 427, 427, _BAD, 0, 0, 0),
    _a("io_setup", 206, 0, 0, 0),
    _a("syslog", 103, 116, 3, 0, 0, also=CAPABILITIES),
    _a("sysinfo", 99, 179, 0),
    _a("sethostname", 170, 161, "x", 1, also=CAPABILITIES),
    _a("reboot", 169, 142, 0, 0, 0, 0, also=CAPABILITIES),
    _a("kexec_load", 246, 104, 0, 0, 0, 0, also=CAPABILITIES),
    _a("init_module", 175, 105, 0, 0, 0, also=CAPABILITIES),
    _a("finit_module", 313, 273, _BAD, 0, 0, also=CAPABILITIES),
    _a("swapoff", 168, 225, "/x", also=CAPABILITIES),
    _a("acct", 163, 89, 0, also=CAPABILITIES),
    _a("quotactl", 179, 60, 0, 0, 0, 0),
    _a("clock_settime", 227, 112, 0, 0),
    _a("iopl", 172, None, 3, also=CAPABILITIES),
    _a("ioperm", 173, None, 0, 1, 1, also=CAPABILITIES),
    _a("vhangup", 153, 58, also=CAPABILITIES),
    _a("landlock_create_ruleset", 444, 444, 0, 0, 99),
    _a("process_mrelease", 448, 448, _BAD, 0),
    _a("futex_waitv", 449, 449, 0, 0, 0, 0, 0),
    _a("a call that is not invented yet", 900, 900),
]
