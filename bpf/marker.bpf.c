// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* The marker: a tc program on clsact egress that writes the tag of a flow into the IPv6 header of its
 * packets, as flow label or as an option in extension headers. It returns no verdict, so the next filter
 * always runs. */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "marker.h"

#define LABEL_MASK 0x000fffff
#define ENTROPY_MASK 0x000c0103
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_AUTH 51
#define EXTENSION_HEADERS 8	/* maximum number to parse */
#define VLAN_TAGS 2
#define OPTION_TYPE 0x1e
#define HEADER_SIZE 8		/* an Options header that contains the option */
#define MIN_MTU 1280		/* every IPv6 link supports it */

const volatile struct settings settings SEC(".rodata.settings");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);	/* set before loading */
	__type(key, struct flow_key);
	__type(value, struct flow_mark);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, UNMARKED_REASONS);
	__type(key, __u32);
	__type(value, __u64);
} unmarked SEC(".maps");

int flowd_write(struct __sk_buff *skb);

/* One entry: the program that writes the flow label in place. The kernel empties the array when it is neither
 * open nor pinned; flow labels are then written by bpf_skb_store_bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__array(values, int (void *));
} writer SEC(".maps") = {
	.values = { [0] = (void *)&flowd_write },
};

struct options_header {
	__u8 next_header;
	__u8 length;
	__u8 option_type;
	__u8 option_length;
	__u8 experiment[2];
	__u8 activity;
	__u8 pad1;
};

struct packet {
	struct flow_key key;	/* ports and protocol are zero if there are none */
	__u32 offset;		/* of the IPv6 header */
	__be32 word;		/* the first of the IPv6 header: version, traffic class, flow label */
	__u16 length;		/* of the payload */
	__u8 next_header;	/* of the IPv6 header */
	__u8 fragment;
	__u8 in_place;		/* see can_write_in_place */
};

static __always_inline int count_unmarked(__u32 reason)
{
	__u64 *count = bpf_map_lookup_elem(&unmarked, &reason);

	if (count)
		(*count)++;
	if (settings.debug)
		bpf_printk("flowd-rs: unmarked, reason %u", reason);
	return TC_ACT_UNSPEC;
}

/* Copies what is needed of an IPv6 header; the addresses go straight into the key. */
static __always_inline void take_header(struct packet *packet, const struct ipv6hdr *ip)
{
	__builtin_memcpy(&packet->word, ip, sizeof(packet->word));
	packet->length = bpf_ntohs(ip->payload_len);
	packet->next_header = ip->nexthdr;
	__builtin_memcpy(packet->key.source, &ip->saddr, 16);
	__builtin_memcpy(packet->key.destination, &ip->daddr, 16);
}

/* Finds the IPv6 header after any VLAN tags in the frame. */
static __always_inline int find_ipv6(struct __sk_buff *skb, struct packet *packet, int ethernet)
{
	__be16 type = bpf_htons(ETH_P_IPV6);
	struct ipv6hdr ip;
	__u32 offset = 0;

	if (ethernet) {
		offset = ETH_HLEN;
		if (bpf_skb_load_bytes(skb, offset - 2, &type, 2))
			return -1;
		for (int tags = 0; tags < VLAN_TAGS; tags++) {
			if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
				break;
			offset += 4;
			if (bpf_skb_load_bytes(skb, offset - 2, &type, 2))
				return -1;
		}
	}
	if (type != bpf_htons(ETH_P_IPV6))
		return -1;
	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 6)
		return -1;
	packet->offset = offset;
	take_header(packet, &ip);
	return 0;
}

/* Finds the ports after any extension headers. */
static __always_inline int find_ports(struct __sk_buff *skb, struct packet *packet)
{
	__u32 offset = packet->offset + sizeof(struct ipv6hdr);
	__u8 next = packet->next_header;

	for (int headers = 0; headers <= EXTENSION_HEADERS; headers++) {
		struct {
			__u8 next;
			__u8 length;
			__be16 fragment;
		} header;

		if (next == IPPROTO_TCP || next == IPPROTO_UDP) {
			packet->key.protocol = next;
			return bpf_skb_load_bytes(skb, offset, &packet->key.source_port, 4);
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != NEXTHDR_FRAGMENT && next != NEXTHDR_AUTH)
			return -1;
		if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)))
			return -1;
		if (next == NEXTHDR_FRAGMENT) {
			if (header.fragment & bpf_htons(0xfff8))
				return -1;
			packet->fragment = 1;
			offset += 8;
		} else if (next == NEXTHDR_AUTH) {
			offset += (header.length + 2) << 2;
		} else {
			offset += (header.length + 1) << 3;
		}
		next = header.next;
	}
	return -1;
}

/* Whether flowd_write may write the label. Before a program that writes in place runs, the kernel makes the
 * whole linear part of the packet writable. If another packet shares it, the kernel may have to copy it, and
 * drops the packet if there is no memory. So only packets are written in place that need no copy: those that
 * this host sends, either unicast UDP, which has no clone, or TCP without payload in the linear part; TCP
 * clones all packets of its queue, but shares only their payload. */
static __always_inline int can_write_in_place(struct __sk_buff *skb, const struct ipv6hdr *ip, void *end)
{
	const struct tcphdr *tcp = (const void *)(ip + 1);

	if (skb->ingress_ifindex)
		return 0;
	if (ip->nexthdr == IPPROTO_UDP)
		return ip->daddr.s6_addr[0] != 0xff;
	return (void *)(tcp + 1) <= end && (void *)tcp + tcp->doff * 4 >= end;
}

/* Fast path: reads a packet in place if TCP or UDP directly follows IPv6 and IPv6 directly follows
 * Ethernet. `make bench` showed a third to a half of the cost of the general path. */
static __always_inline int find_plain(struct __sk_buff *skb, struct packet *packet, int ethernet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *frame = data;
	struct ipv6hdr *ip = data + (ethernet ? ETH_HLEN : 0);
	__be32 *ports = (void *)(ip + 1);

	if ((void *)(ports + 1) > end)
		return -1;
	if (ethernet && frame->h_proto != bpf_htons(ETH_P_IPV6))
		return -1;
	if (ip->version != 6 || (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP))
		return -1;
	packet->offset = ethernet ? ETH_HLEN : 0;
	take_header(packet, ip);
	/* One copy: the map's functions read both ports at once. */
	__builtin_memcpy(&packet->key.source_port, ports, sizeof(*ports));
	packet->key.protocol = ip->nexthdr;
	packet->in_place = ethernet && can_write_in_place(skb, ip, end);
	return 0;
}

/* The entropy bits of labels with match_all; the daemon computes those of individual flows. */
static __always_inline __u32 entropy(const struct packet *packet)
{
	__u64 words[5], hash = settings.entropy_key;

	__builtin_memcpy(words, &packet->key, sizeof(words));
	for (int i = 0; i < 5; i++) {
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ULL;
		hash ^= hash >> 32;
	}
	return hash & ENTROPY_MASK;
}

/* Version, traffic class (DSCP, ECN) and the new label. */
static __always_inline __be32 label_word(const struct packet *packet, __u32 label)
{
	return (packet->word & bpf_htonl(~LABEL_MASK)) | bpf_htonl(label & LABEL_MASK);
}

static __always_inline void fill_header(struct options_header *header, __u8 next, __u32 tag)
{
	header->next_header = next;
	header->length = 0;
	header->option_type = OPTION_TYPE;
	header->option_length = 3;
	header->experiment[0] = tag >> 16;
	header->experiment[1] = tag >> 8;
	header->activity = tag;
	header->pad1 = 0;
}

static __always_inline int too_large(struct __sk_buff *skb, const struct packet *packet, __u32 grow)
{
	__u32 mtu = 0;

	/* A GSO packet is split into smaller segments instead. */
	if (skb->gso_size)
		return 0;
	if (skb->len - packet->offset + grow <= MIN_MTU)
		return 0;
	if (!settings.check_mtu)
		return 1;
	return bpf_check_mtu(skb, 0, &mtu, grow, 0) != 0;
}

/* Returns 0 on success, else a reason plus one. */
static __always_inline int add_headers(struct __sk_buff *skb, const struct packet *packet, __u32 tag)
{
	__u32 grow = (settings.hop_by_hop ? HEADER_SIZE : 0) + (settings.destination ? HEADER_SIZE : 0);
	__u32 length = packet->length;
	struct options_header headers[2];
	__be16 payload;
	__u8 first;

	/* A Hop-by-Hop header must come first and only once; all fragments of a packet must have the same
	 * headers; the length of a jumbogram is in an option. */
	if (packet->next_header == IPPROTO_HOPOPTS || packet->fragment || length == 0 || length + grow > 65535)
		return 1 + UNMARKED_HEADERS;
	if (too_large(skb, packet, grow))
		return 1 + UNMARKED_MTU;
	if (bpf_skb_adjust_room(skb, grow, BPF_ADJ_ROOM_NET, 0))
		return 1 + UNMARKED_REFUSED;
	first = settings.hop_by_hop ? IPPROTO_HOPOPTS : IPPROTO_DSTOPTS;
	if (settings.hop_by_hop && settings.destination) {
		fill_header(&headers[0], IPPROTO_DSTOPTS, tag);
		fill_header(&headers[1], packet->next_header, tag);
		bpf_skb_store_bytes(skb, packet->offset + sizeof(struct ipv6hdr), headers, 2 * HEADER_SIZE, 0);
	} else {
		fill_header(&headers[0], packet->next_header, tag);
		bpf_skb_store_bytes(skb, packet->offset + sizeof(struct ipv6hdr), headers, HEADER_SIZE, 0);
	}
	payload = bpf_htons(length + grow);
	bpf_skb_store_bytes(skb, packet->offset + offsetof(struct ipv6hdr, payload_len), &payload, 2, 0);
	bpf_skb_store_bytes(skb, packet->offset + offsetof(struct ipv6hdr, nexthdr), &first, 1, 0);
	return 0;
}

static __always_inline void count_marked(struct flow_mark *flow, __u64 packets, __u64 bytes)
{
	__sync_fetch_and_add(&flow->packets, packets);
	__sync_fetch_and_add(&flow->bytes, bytes);
}

static __always_inline int mark(struct __sk_buff *skb, int ethernet)
{
	struct packet packet = {};
	struct flow_mark *flow;
	__u64 segments, bytes = skb->len;
	__be32 word;
	__u32 label;

	if (find_plain(skb, &packet, ethernet)) {
		if (find_ipv6(skb, &packet, ethernet))
			return TC_ACT_UNSPEC;
		/* With match_all, packets without ports (ICMPv6, later fragments) are marked, too. */
		if (find_ports(skb, &packet) && !settings.match_all)
			return TC_ACT_UNSPEC;
	}
	if (settings.match_all) {
		struct flow_key all = {};

		flow = bpf_map_lookup_elem(&flows, &all);
	} else {
		flow = bpf_map_lookup_elem(&flows, &packet.key);
	}
	if (!flow)
		return TC_ACT_UNSPEC;
	segments = skb->gso_segs ? skb->gso_segs : 1;
	label = flow->label;
	if (settings.debug)
		bpf_printk("flowd-rs: marking, tag %x, label %x", flow->tag, label);
	if (settings.hop_by_hop || settings.destination) {
		int reason = add_headers(skb, &packet, flow->tag);

		if (reason)
			return count_unmarked(reason - 1);
		count_marked(flow, segments, bytes);
		return TC_ACT_UNSPEC;
	}
	if (settings.match_all)
		label = (label & ~ENTROPY_MASK) | entropy(&packet);
	word = label_word(&packet, label);
	/* Counted first: the tail call returns only if the array is empty. */
	count_marked(flow, segments, bytes);
	if (packet.in_place) {
		skb->cb[4] = word;
		bpf_tail_call(skb, &writer, 0);
	}
	if (bpf_skb_store_bytes(skb, packet.offset, &word, sizeof(word), 0)) {
		count_marked(flow, -segments, -bytes);
		return count_unmarked(UNMARKED_REFUSED);
	}
	return TC_ACT_UNSPEC;
}

SEC("tc")
int flowd_mark_l2(struct __sk_buff *skb)
{
	return mark(skb, 1);
}

/* For devices without a link-layer header. */
SEC("tc")
int flowd_mark_l3(struct __sk_buff *skb)
{
	if (skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_UNSPEC;
	return mark(skb, 0);
}

/* Writes the label of a plain frame, after a tail call from flowd_mark_l2. It is a program of its own because
 * the kernel prepares the packet for writing (see can_write_in_place) before all runs of a program that writes
 * in place, and most packets are not to be written. */
SEC("tc")
int flowd_write(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + ETH_HLEN + sizeof(__be32) <= end)
		*(__be32 *)(data + ETH_HLEN) = skb->cb[4];
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
