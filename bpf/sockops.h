/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by sockops.bpf.c and src/sys/sockops.rs. */
#pragma once

#include <linux/types.h>

enum sockops_kind {
	SOCKOPS_CONNECTED = 1,	/* this end opened the connection */
	SOCKOPS_ACCEPTED = 2,	/* the other end did */
	SOCKOPS_NEWS = 3,
	SOCKOPS_CLOSED = 4,
};

/* A connection of the cgroup, and its statistics. */
struct sockops_event {
	__u64 time;		/* ns since boot, CLOCK_MONOTONIC */
	__u64 bytes_received;
	__u64 bytes_acked;
	__u8 local[16];		/* IPv4 in the first four bytes */
	__u8 remote[16];
	__u16 local_port;	/* host byte order */
	__u16 remote_port;	/* host byte order */
	__u8 family;		/* AF_INET or AF_INET6 */
	__u8 kind;
	__u8 state;		/* TCP state; for a closed connection, the previous state */
	__u8 zero;
	__u32 srtt;		/* us, times 8 */
	__u32 rtt_min;		/* us */
	__u32 snd_cwnd;		/* segments */
	__u32 snd_ssthresh;	/* segments */
	__u32 mss_cache;
	__u32 rate_delivered;	/* segments in ... */
	__u32 rate_interval;	/* ... us */
	__u32 packets_out;
	__u32 retrans_out;
	__u32 total_retrans;
	__u32 segs_in;
	__u32 segs_out;
	__u32 data_segs_in;
	__u32 data_segs_out;
	__u32 lost_out;
	__u32 sacked_out;
	char congestion[16];
};

/* Set before loading. Ports are in host byte order; 0 means no limit. */
struct sockops_settings {
	__u64 period;		/* ns between two ongoing events of a connection; 0 for starts and ends only */
	__u32 transitions;	/* send an event for each change of state */
	__u32 debug;		/* write to the trace pipe */
	__u16 local_least;
	__u16 local_most;
	__u16 remote_least;
	__u16 remote_most;
};
