// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* A sock_ops program on a cgroup that reports the TCP connections of its processes: when they are
 * established, when they are closed, and their statistics in between. It modifies no connection.
 *
 * There are two variants, which differ in how events reach user space: through a ring buffer, or through
 * a perf buffer if the kernel has no ring buffers (before Linux 5.8). The loader selects one. */

#include <linux/bpf.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "sockops.h"

#define AF_INET 2
#define AF_INET6 10
#define SOL_TCP 6
#define TCP_CONGESTION 13
#define TCP_CLOSE 7

const volatile struct sockops_settings settings SEC(".rodata.settings");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} perf SEC(".maps");

/* The number of events that were lost because the buffer was full. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

struct ends {
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
};

/* The time of the last ongoing event of each connection. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1 << 16);
	__type(key, struct ends);
	__type(value, __u64);
} told SEC(".maps");

static __always_inline int within(__u16 port, __u16 least, __u16 most)
{
	return port >= least && (!most || port <= most);
}

/* Returns 0 if the connection is not to be reported. */
static __always_inline int describe(struct bpf_sock_ops *ops, struct sockops_event *event)
{
	__u32 *local = (__u32 *)event->local, *remote = (__u32 *)event->remote;

	event->local_port = ops->local_port;
	event->remote_port = bpf_ntohl(ops->remote_port);
	if (!within(event->local_port, settings.local_least, settings.local_most) ||
	    !within(event->remote_port, settings.remote_least, settings.remote_most))
		return 0;
	event->family = ops->family;
	if (ops->family == AF_INET) {
		local[0] = ops->local_ip4;
		remote[0] = ops->remote_ip4;
	} else if (ops->family == AF_INET6) {
		local[0] = ops->local_ip6[0];
		local[1] = ops->local_ip6[1];
		local[2] = ops->local_ip6[2];
		local[3] = ops->local_ip6[3];
		remote[0] = ops->remote_ip6[0];
		remote[1] = ops->remote_ip6[1];
		remote[2] = ops->remote_ip6[2];
		remote[3] = ops->remote_ip6[3];
	} else {
		return 0;
	}
	event->time = bpf_ktime_get_ns();
	return 1;
}

static __always_inline void measure(struct bpf_sock_ops *ops, struct sockops_event *event)
{
	event->bytes_received = ops->bytes_received;
	event->bytes_acked = ops->bytes_acked;
	event->srtt = ops->srtt_us;
	event->rtt_min = ops->rtt_min;
	event->snd_cwnd = ops->snd_cwnd;
	event->snd_ssthresh = ops->snd_ssthresh;
	event->mss_cache = ops->mss_cache;
	event->rate_delivered = ops->rate_delivered;
	event->rate_interval = ops->rate_interval_us;
	event->packets_out = ops->packets_out;
	event->retrans_out = ops->retrans_out;
	event->total_retrans = ops->total_retrans;
	event->segs_in = ops->segs_in;
	event->segs_out = ops->segs_out;
	event->data_segs_in = ops->data_segs_in;
	event->data_segs_out = ops->data_segs_out;
	event->lost_out = ops->lost_out;
	event->sacked_out = ops->sacked_out;
	bpf_getsockopt(ops, SOL_TCP, TCP_CONGESTION, event->congestion, sizeof(event->congestion));
}

/* Whether the next ongoing event of a connection is due. */
static __always_inline int is_due(struct sockops_event *event)
{
	struct ends ends = {};
	__u64 *last;

	__builtin_memcpy(ends.local, event->local, 16);
	__builtin_memcpy(ends.remote, event->remote, 16);
	ends.local_port = event->local_port;
	ends.remote_port = event->remote_port;
	last = bpf_map_lookup_elem(&told, &ends);
	if (last && event->time - *last < settings.period)
		return 0;
	bpf_map_update_elem(&told, &ends, &event->time, BPF_ANY);
	return 1;
}

static __always_inline int watch(struct bpf_sock_ops *ops, struct sockops_event *event)
{
	int flags = BPF_SOCK_OPS_STATE_CB_FLAG;

	switch (ops->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (!describe(ops, event))
			return 0;
		event->kind = ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ? SOCKOPS_CONNECTED : SOCKOPS_ACCEPTED;
		event->state = 1;
		if (settings.period)
			flags |= BPF_SOCK_OPS_RTT_CB_FLAG;
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | flags);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] != TCP_CLOSE && !settings.transitions)
			return 0;
		if (!describe(ops, event))
			return 0;
		event->kind = ops->args[1] == TCP_CLOSE ? SOCKOPS_CLOSED : SOCKOPS_NEWS;
		event->state = ops->args[1] == TCP_CLOSE ? ops->args[0] : ops->args[1];
		break;
	case BPF_SOCK_OPS_RTT_CB:
		if (!settings.period || !describe(ops, event) || !is_due(event))
			return 0;
		event->kind = SOCKOPS_NEWS;
		event->state = ops->state;
		break;
	default:
		return 0;
	}
	measure(ops, event);
	if (settings.debug)
		bpf_printk("flowd-rs: sockops kind %d state %d port %d", event->kind, event->state, event->local_port);
	return 1;
}

static __always_inline void count_lost(void)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&lost, &zero);

	if (count)
		*count += 1;
}

SEC("sockops")
int flowd_sockops_ring(struct bpf_sock_ops *ops)
{
	struct sockops_event event = {};

	if (watch(ops, &event) && bpf_ringbuf_output(&ring, &event, sizeof(event), 0))
		count_lost();
	return 1;
}

SEC("sockops")
int flowd_sockops_perf(struct bpf_sock_ops *ops)
{
	struct sockops_event event = {};

	if (watch(ops, &event) && bpf_perf_event_output(ops, &perf, BPF_F_CURRENT_CPU, &event, sizeof(event)))
		count_lost();
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
