//! The filter of system calls that container runtimes have by default (`RuntimeDefault`): what containerd 1.7 allows on
//! x86-64, with the capabilities that a container has. All else fails with `EPERM`.

use anyhow::{Context, Result};

/// Filters the calling thread from now on, and whatever it executes.
#[cfg(target_arch = "x86_64")]
pub(super) fn install(capabilities: u64) -> Result<()> {
    let is_admin = capabilities & (1 << 21) != 0;
    let is_ptracer = capabilities & (1 << 19) != 0;
    let may_chroot = capabilities & (1 << 18) != 0;
    let mut program = vec![
        // Of another architecture nothing is allowed.
        statement(LOAD, ARCHITECTURE_AT),
        jump(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        statement(RETURN, KILL),
        statement(LOAD, NUMBER_AT),
    ];
    let mut allow = |calls: &[i64]| {
        for call in calls {
            program.push(jump(EQUAL, u32::try_from(*call).unwrap_or(u32::MAX), 0, 1));
            program.push(statement(RETURN, ALLOW));
        }
    };
    allow(USUAL);
    if is_admin {
        allow(OF_ADMINS);
    }
    if is_ptracer {
        allow(OF_PTRACERS);
    }
    if may_chroot {
        allow(&[libc::SYS_chroot]);
    }
    // So that the C library takes clone(2), whose arguments a filter can see.
    program.push(jump(EQUAL, libc::SYS_clone3 as u32, 0, 1));
    program.push(statement(RETURN, FAIL | libc::ENOSYS.unsigned_abs()));
    program.push(statement(RETURN, FAIL | libc::EPERM.unsigned_abs()));
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).context("too many rules")?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives until then and is as long as it says.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
            0,
            0,
        )
    };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("filtering system calls");
    }
    Ok(())
}

/// Elsewhere the numbers are others; the containers of tests run without.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn install(_: u64) -> Result<()> {
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn statement(code: u32, k: u32) -> libc::sock_filter {
    jump(code, k, 0, 0)
}

#[cfg(target_arch = "x86_64")]
fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = code as u16;
    libc::sock_filter { code, jt, jf, k }
}

#[cfg(target_arch = "x86_64")]
mod numbers {
    use libc::{
        BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
        SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS,
    };

    pub(super) const LOAD: u32 = BPF_LD | BPF_W | BPF_ABS;
    pub(super) const EQUAL: u32 = BPF_JMP | BPF_JEQ | BPF_K;
    pub(super) const RETURN: u32 = BPF_RET | BPF_K;
    pub(super) const ALLOW: u32 = SECCOMP_RET_ALLOW;
    pub(super) const FAIL: u32 = SECCOMP_RET_ERRNO;
    pub(super) const KILL: u32 = SECCOMP_RET_KILL_PROCESS;
    /// In `struct seccomp_data`.
    pub(super) const NUMBER_AT: u32 = 0;
    pub(super) const ARCHITECTURE_AT: u32 = 4;
    pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    pub(super) const OF_ADMINS: &[i64] = &[
        libc::SYS_bpf,
        libc::SYS_clone3,
        libc::SYS_fanotify_init,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fsopen,
        libc::SYS_fspick,
        libc::SYS_lookup_dcookie,
        libc::SYS_mount,
        libc::SYS_mount_setattr,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_perf_event_open,
        libc::SYS_quotactl,
        libc::SYS_setdomainname,
        libc::SYS_sethostname,
        libc::SYS_setns,
        libc::SYS_umount2,
        libc::SYS_unshare,
    ];
    pub(super) const OF_PTRACERS: &[i64] = &[
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
        libc::SYS_process_madvise,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_ptrace,
    ];
    /// What any container may call.
    #[rustfmt::skip]
    pub(super) const USUAL: &[i64] = &[
        libc::SYS_accept, libc::SYS_accept4, libc::SYS_access, libc::SYS_alarm, libc::SYS_bind, libc::SYS_brk,
        libc::SYS_capget, libc::SYS_capset, libc::SYS_chdir, libc::SYS_chmod, libc::SYS_chown,
        libc::SYS_clock_adjtime, libc::SYS_clock_getres, libc::SYS_clock_gettime, libc::SYS_clock_nanosleep,
        libc::SYS_clone, libc::SYS_close, libc::SYS_close_range, libc::SYS_connect, libc::SYS_copy_file_range,
        libc::SYS_creat, libc::SYS_dup, libc::SYS_dup2, libc::SYS_dup3, libc::SYS_epoll_create,
        libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_ctl_old, libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2, libc::SYS_epoll_wait, libc::SYS_epoll_wait_old, libc::SYS_eventfd,
        libc::SYS_eventfd2, libc::SYS_execve, libc::SYS_execveat, libc::SYS_exit, libc::SYS_exit_group,
        libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_fadvise64, libc::SYS_fallocate, libc::SYS_fanotify_mark,
        libc::SYS_fchdir, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown, libc::SYS_fchownat,
        libc::SYS_fcntl, libc::SYS_fdatasync, libc::SYS_fgetxattr, libc::SYS_flistxattr, libc::SYS_flock,
        libc::SYS_fork, libc::SYS_fremovexattr, libc::SYS_fsetxattr, libc::SYS_fstat, libc::SYS_fstatfs,
        libc::SYS_fsync, libc::SYS_ftruncate, libc::SYS_futex, libc::SYS_futex_waitv, libc::SYS_futimesat,
        libc::SYS_getcpu, libc::SYS_getcwd, libc::SYS_getdents, libc::SYS_getdents64, libc::SYS_getegid,
        libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getgroups, libc::SYS_getitimer, libc::SYS_getpeername,
        libc::SYS_getpgid, libc::SYS_getpgrp, libc::SYS_getpid, libc::SYS_getppid, libc::SYS_getpriority,
        libc::SYS_getrandom, libc::SYS_getresgid, libc::SYS_getresuid, libc::SYS_getrlimit,
        libc::SYS_get_robust_list, libc::SYS_getrusage, libc::SYS_getsid, libc::SYS_getsockname,
        libc::SYS_getsockopt, libc::SYS_get_thread_area, libc::SYS_gettid, libc::SYS_gettimeofday, libc::SYS_getuid,
        libc::SYS_getxattr, libc::SYS_inotify_add_watch, libc::SYS_inotify_init, libc::SYS_inotify_init1,
        libc::SYS_inotify_rm_watch, libc::SYS_io_cancel, libc::SYS_ioctl, libc::SYS_io_destroy,
        libc::SYS_io_getevents, libc::SYS_ioprio_get, libc::SYS_ioprio_set,
        libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_kill, libc::SYS_landlock_add_rule,
        libc::SYS_landlock_create_ruleset, libc::SYS_landlock_restrict_self, libc::SYS_lchown, libc::SYS_lgetxattr,
        libc::SYS_link, libc::SYS_linkat, libc::SYS_listen, libc::SYS_listxattr, libc::SYS_llistxattr,
        libc::SYS_lremovexattr, libc::SYS_lseek, libc::SYS_lsetxattr, libc::SYS_lstat, libc::SYS_madvise,
        libc::SYS_membarrier, libc::SYS_memfd_create, libc::SYS_memfd_secret, libc::SYS_mincore, libc::SYS_mkdir,
        libc::SYS_mkdirat, libc::SYS_mknod, libc::SYS_mknodat, libc::SYS_mlock, libc::SYS_mlock2, libc::SYS_mlockall,
        libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_mq_getsetattr, libc::SYS_mq_notify, libc::SYS_mq_open,
        libc::SYS_mq_timedreceive, libc::SYS_mq_timedsend, libc::SYS_mq_unlink, libc::SYS_mremap, libc::SYS_msgctl,
        libc::SYS_msgget, libc::SYS_msgrcv, libc::SYS_msgsnd, libc::SYS_msync, libc::SYS_munlock,
        libc::SYS_munlockall, libc::SYS_munmap, libc::SYS_name_to_handle_at, libc::SYS_nanosleep,
        libc::SYS_newfstatat, libc::SYS_open, libc::SYS_openat, libc::SYS_openat2, libc::SYS_pause,
        libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal, libc::SYS_pipe, libc::SYS_pipe2, libc::SYS_pkey_alloc,
        libc::SYS_pkey_free, libc::SYS_pkey_mprotect, libc::SYS_poll, libc::SYS_ppoll, libc::SYS_prctl,
        libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_prlimit64, libc::SYS_process_mrelease,
        libc::SYS_pselect6, libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2, libc::SYS_read,
        libc::SYS_readahead, libc::SYS_readlink, libc::SYS_readlinkat, libc::SYS_readv, libc::SYS_recvfrom,
        libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_remap_file_pages, libc::SYS_removexattr, libc::SYS_rename,
        libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_restart_syscall, libc::SYS_rmdir, libc::SYS_rseq,
        libc::SYS_rt_sigaction, libc::SYS_rt_sigpending, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_sigreturn, libc::SYS_rt_sigsuspend, libc::SYS_rt_sigtimedwait, libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_sched_getaffinity, libc::SYS_sched_getattr, libc::SYS_sched_getparam,
        libc::SYS_sched_get_priority_max, libc::SYS_sched_get_priority_min, libc::SYS_sched_getscheduler,
        libc::SYS_sched_rr_get_interval, libc::SYS_sched_setaffinity, libc::SYS_sched_setattr,
        libc::SYS_sched_setparam, libc::SYS_sched_setscheduler, libc::SYS_sched_yield, libc::SYS_seccomp,
        libc::SYS_select, libc::SYS_semctl, libc::SYS_semget, libc::SYS_semop, libc::SYS_semtimedop,
        libc::SYS_sendfile, libc::SYS_sendmmsg, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setfsgid,
        libc::SYS_setfsuid, libc::SYS_setgid, libc::SYS_setgroups, libc::SYS_setitimer, libc::SYS_setpgid,
        libc::SYS_setpriority, libc::SYS_setregid, libc::SYS_setresgid, libc::SYS_setresuid, libc::SYS_setreuid,
        libc::SYS_setrlimit, libc::SYS_set_robust_list, libc::SYS_setsid, libc::SYS_setsockopt,
        libc::SYS_set_thread_area, libc::SYS_set_tid_address, libc::SYS_setuid, libc::SYS_setxattr, libc::SYS_shmat,
        libc::SYS_shmctl, libc::SYS_shmdt, libc::SYS_shmget, libc::SYS_shutdown, libc::SYS_sigaltstack,
        libc::SYS_signalfd, libc::SYS_signalfd4, libc::SYS_socket, libc::SYS_socketpair, libc::SYS_splice,
        libc::SYS_stat, libc::SYS_statfs, libc::SYS_statx, libc::SYS_symlink, libc::SYS_symlinkat, libc::SYS_sync,
        libc::SYS_sync_file_range, libc::SYS_syncfs, libc::SYS_sysinfo, libc::SYS_tee, libc::SYS_tgkill,
        libc::SYS_time, libc::SYS_timer_create, libc::SYS_timer_delete, libc::SYS_timer_getoverrun,
        libc::SYS_timer_gettime, libc::SYS_timer_settime, libc::SYS_timerfd_create, libc::SYS_timerfd_gettime,
        libc::SYS_timerfd_settime, libc::SYS_times, libc::SYS_tkill, libc::SYS_truncate, libc::SYS_umask,
        libc::SYS_uname, libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_utime, libc::SYS_utimensat,
        libc::SYS_utimes, libc::SYS_vfork, libc::SYS_vmsplice, libc::SYS_wait4, libc::SYS_waitid, libc::SYS_write,
        libc::SYS_writev, libc::SYS_arch_prctl, libc::SYS_modify_ldt,
    ];
}

#[cfg(target_arch = "x86_64")]
use numbers::{
    ALLOW, ARCHITECTURE_AT, AUDIT_ARCH_X86_64, EQUAL, FAIL, KILL, LOAD, NUMBER_AT, OF_ADMINS,
    OF_PTRACERS, RETURN, USUAL,
};
