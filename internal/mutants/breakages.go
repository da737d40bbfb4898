package main

import (
	"fmt"
	"strings"
)

// breakage is a mistake, and the test that is to notice it.
type breakage struct {
	name  string
	file  string
	edits []edit
	dir   string // the package of the test
	test  string
}

// edit replaces text that stands in the file exactly once.
type edit struct{ old, new string }

// apply breaks the text of the file.
func (b breakage) apply(text string) (string, error) {
	for _, e := range b.edits {
		if n := strings.Count(text, e.old); n != 1 {
			return "", fmt.Errorf("%s has this %d times, not once:\n%s", b.file, n, e.old)
		}
		text = strings.Replace(text, e.old, e.new, 1)
	}
	return text, nil
}

// breakages are those that cost most where nobody notices them.
func breakages() []breakage { //nolint:revive // a list, not a function
	return []breakage{
		{
			name: "count a send without error as delivered",
			file: "transport/link/stream.go",
			edits: []edit{
				{"\t\tclear(s.w.kept) // the window has them\n\t\ts.w.kept = s.w.kept[:0]\n", ""},
				{
					"\t\t\td.Written()\n\t\t}\n\t}\n}\n",
					"\t\t\td.Written()\n\t\t}\n\t\tfor _, e := range s.w.kept {\n\t\t\t_, _ = e.d.Ack(engine.Ack{Delivered: e.d.Targets()})\n\t\t}\n\t}\n}\n",
				},
			},
			dir: "transport/link", test: "TestRemovedNodeThatNeverAcksEndsUnknown",
		},
		{
			name: "never remove a dead node",
			file: "transport/discovery/registry.go",
			edits: []edit{{
				"\tfor id := range r.held {\n\t\tnext[id] = r.current[id]\n\t}\n",
				"\tfor id, node := range r.current {\n\t\tif _, ok := next[id]; !ok {\n\t\t\tnext[id] = node\n\t\t}\n\t}\n",
			}},
			dir: "transport/discovery", test: "TestDeadNodeGoesWithItsKey",
		},
		{
			name: "drop the re-list after a compaction",
			file: "transport/discovery/watcher.go",
			edits: []edit{{
				"\t\tl.m.breakCompacted.Inc()\n",
				"\t\tl.m.breakCompacted.Inc()\n\t\tl.stopWatch()\n\t\tl.opening, l.events = nil, nil\n\t\treturn\n",
			}},
			dir: "transport/discovery", test: "TestCompactionWhileDisconnected",
		},
		{
			name:  "ask nobody who calls",
			file:  "transport/ingress/admission.go",
			edits: []edit{{"\tif s.cfg.Auth != nil {\n\t\tif err := s.authenticate(ctx, &info)", "\tif s.cfg.Auth == nil {\n\t\tif err := s.authenticate(ctx, &info)"}},
			dir:   "transport/ingress", test: "TestEveryWayInAsksWhoCalls",
		},
		{
			name:  "let a caller that was removed go on in its stream",
			file:  "transport/ingress/stream.go",
			edits: []edit{{"if s.cfg.Auth != nil && !s.cfg.Auth.Valid(", "if s.cfg.Auth == nil && !s.cfg.Auth.Valid("}},
			dir:   "transport/ingress", test: "TestARevokedCallerIsRefusedWithItsNextMessage",
		},
		{
			name:  "ask for the rights of a unary push alone",
			file:  "transport/ingress/stream.go",
			edits: []edit{{"\tif err := s.authorize(st.info.principal, c.api, &c.push); err != nil {\n\t\treturn err\n\t}\n", ""}},
			dir:   "transport/ingress", test: "TestAPushIsDeniedAsAWhole",
		},
		{
			name:  "leave the policy out of the program",
			file:  "internal/app/pushmanager/run.go",
			edits: []edit{{"\tif cfg.Ingress.Auth, err = cfg.Auth.open(", "\tif _, err = cfg.Auth.open("}},
			dir:   "internal/app/pushmanager", test: "TestCallersArePartOfTheProgram",
		},
		{
			name:  "swap unknown for failed",
			file:  "engine/delivery.go",
			edits: []edit{{"d.outcome, d.reason = Unknown, r\n", "d.outcome, d.reason = Failed, r\n"}},
			dir:   "engine", test: "TestOutcomesOfEachKindOfPush",
		},
		{
			name: "lose the bound of the queue",
			file: "transport/link/link.go",
			edits: []edit{{
				"l.load.len == 0 || l.load.len < p.Share(cfg.QueueLen) && l.load.bytes+e.size <= p.Share(cfg.QueueBytes)",
				"p < 100", // neither bound is left
			}},
			dir: "transport/link", test: "TestNodeThatNeverReadsFailsTheQueueAndLosesTheWindow",
		},
		{
			name:  "answer before the ack",
			file:  "engine/push.go",
			edits: []edit{{"\tp.pending.Add(1)\n", ""}},
			dir:   "engine", test: "TestDeadlineAfterWritingIsUnknown",
		},
		{
			name: "share a buffer after its release",
			file: "transport/link/stream.go",
			edits: []edit{{
				"\t\ts.w.out.buf = mem.NewBuffer(buf, &l.set.buffers)\n",
				"\t\ts.w.out.buf = mem.NewBuffer(buf, &l.set.buffers)\n\t\tl.set.buffers.Put(buf)\n",
			}},
			dir: "transport/link", test: "TestFramesKeepTheirBytesUntilTheyAreOnTheWire",
		},
		{
			name:  `skip the re-look-up after "not here"`,
			file:  "engine/delivery.go",
			edits: []edit{{"len(missing) > 0 && !d.healed &&", "len(missing) > 0 && d.healed &&"}},
			dir:   "engine", test: "TestStaleRoutesHealWithOneLookup",
		},
		{
			name:  "reorder under the pool",
			file:  "transport/link/unary.go",
			edits: []edit{{"\t\t\t\tla.busy = true\n", ""}},
			dir:   "transport/link", test: "TestUnaryCallsKeepTheOrderOfEachKey",
		},
		{
			name:  "leak the link of a node that was replaced",
			file:  "transport/link/set.go",
			edits: []edit{{"\t\t\tn.close(engine.DropUnreachable)\n", ""}},
			dir:   "transport/link", test: "TestSameIDAtANewAddressIsReplacedAtOnce",
		},
		{
			name:  "pay for the caller of a push that its tenant cannot pay for",
			file:  "transport/ingress/callers.go",
			edits: []edit{{"\tif able && secondAble {\n", "\tif able && !secondAble {\n\t\tfirst.spendLocked()\n\t}\n\tif able && secondAble {\n"}},
			dir:   "transport/ingress", test: "TestAPushIsPaidForByBothOrByNeither",
		},
		{
			name:  "give credit to the end of a quota",
			file:  "internal/quota/quota.go",
			edits: []edit{{"-max(rest-q.limit/last, 0)/credit", "-rest"}},
			dir:   "internal/quota", test: "TestThreeInstancesStopWithinAPercentOfTheLimit",
		},
		{
			name:  "leave the file of the audit log open when it was renamed",
			file:  "internal/app/pushmanager/run.go",
			edits: []edit{{"\t\tm.audit.Reload()\n", ""}},
			dir:   "internal/app/pushmanager", test: "TestNoSecretIsShownAnywhere",
		},
		// Wiring: the parts work, and one of them is not connected.
		{
			name:  "forget to hand a setting over",
			file:  "internal/app/pushmanager/config.go",
			edits: []edit{{"\tc.Discovery.RequestTimeout, c.Entry.RequestTimeout = c.Etcd.RequestTimeout, c.Etcd.RequestTimeout\n", "\tc.Discovery.RequestTimeout = c.Etcd.RequestTimeout\n"}},
			dir:   "internal/app", test: "TestEveryKeyIsHandedToItsPackages",
		},
		{
			name:  "let everybody read profiles, whatever the setting says",
			file:  "internal/app/pushmanager/run.go",
			edits: []edit{{"PprofRemote: cfg.PprofRemote,", "PprofRemote: true,"}},
			dir:   "internal/app/pushmanager", test: "TestProfilesAreForOthersOnlyWhereTheSettingSaysSo",
		},
		{
			name:  "tell no balancer that pushes cannot be delivered",
			file:  "internal/app/pushmanager/health.go",
			edits: []edit{{"\tcfg.Health.OnChange = m.ingress.SetHealthy\n", ""}},
			dir:   "internal/app/pushmanager", test: "TestReadinessTellsWhetherPushesCanBeDelivered",
		},
		{
			name:  "report nothing again after the node was lost in etcd",
			file:  "internal/refgateway/gateway.go",
			edits: []edit{{"\t\tmembers.Registered = g.node.Registered\n", ""}},
			dir:   "internal/refgateway", test: "TestMembershipsAreReportedAgainWhenTheNodeWasLostInEtcd",
		},
		{
			name:  "keep the connections of a withdrawn key",
			file:  "internal/refgateway/client.go",
			edits: []edit{{"\t\t\tg.checkIdentity(c, date)\n", "\t\t\t_ = date\n"}},
			dir:   "internal/refgateway", test: "TestConnectionEndsWithTheKeyOfItsToken",
		},
		{
			name:  "refresh for another tenant",
			file:  "internal/refgateway/identity.go",
			edits: []edit{{"id.user != c.user || id.tenant != c.tenant", "id.user != c.user"}},
			dir:   "internal/refgateway", test: "TestRefresh",
		},
		{
			name:  "forget the unverified when the node goes",
			file:  "internal/refgateway/gateway.go",
			edits: []edit{{"\tg.unverified.each(func(c *conn) { c.bye(closeGoingAway, false) })\n", ""}},
			dir:   "internal/refgateway", test: "TestNodeThatLeavesTellsTheUnverified",
		},
		{
			name:  "tell a reload to the certificates alone",
			file:  "internal/app/connectnode/run.go",
			edits: []edit{{"\t\tn.tokens.Reload()\n", ""}},
			dir:   "internal/app/connectnode", test: "TestClientsNeedATokenWhereSettingsSaySo",
		},
		{
			name:  "take the last memory limit for the lowest",
			file:  "internal/cli/memory.go",
			edits: []edit{{"limit = min(limit, n)", "limit = n"}},
			dir:   "internal/cli", test: "TestContainerLimitIsTheLowestOnTheWayUp",
		},
		{
			name:  "hand an id out twice",
			file:  "transport/node/inbox.go",
			edits: []edit{{"\t\t\tb.seen.add(o.Key, o.PayloadHash)\n", ""}},
			dir:   "transport/node", test: "TestAnIdIsShownOnce",
		},
		{
			name:  "let what is new overtake what is stored",
			file:  "transport/node/replay.go",
			edits: []edit{{"\tif len(r.streams) > 0 {\n\t\tr.closeLocked(g, now)\n\t}\n", ""}},
			dir:   "transport/node", test: "TestWhatWasStoredComesBeforeWhatIsNew",
		},
		{
			name:  "keep whatever comes behind a closed gate",
			file:  "transport/node/inbox.go",
			edits: []edit{{"if len(b.held) >= HeldFrames || len(b.held) > 0 && b.heldBytes+size > HeldBytes {", "if b.closed {"}},
			dir:   "transport/node", test: "TestWhatWaitsBehindTheGateIsBounded",
		},
		{
			name:  "nudge the nodes of the route as it was",
			file:  "engine/keeping.go",
			edits: []edit{{"l.push.engine.directory.Locate(l.shard, k.stored, k)", "k.Routed(k.stored, nil, errNoAnswer)"}},
			dir:   "engine", test: "TestStoredMessagesReachWhoeverConnects",
		},
		{
			name:  "wait for no nudge",
			file:  "engine/keeping.go",
			edits: []edit{{"\t\t\t\tk.open.Add(1)\n\t\t\t\tl.Nudge(user, k.places[i], func(bool) { k.nudged() })", "\t\t\t\tl.Nudge(user, k.places[i], func(bool) {})"}},
			dir:   "engine", test: "TestStoredMessagesReachWhoeverConnects",
		},
		{
			name:  "erase what the client has not taken",
			file:  "transport/replay/replay.go",
			edits: []edit{{"to := min(r.taken, r.delivered)", "to := r.delivered"}},
			dir:   "transport/replay", test: "TestProtocol",
		},
		{
			name: "let a push to a room overtake one to several rooms with it",
			file: "engine/rooms.go",
			edits: []edit{{
				"\tmust := waits > 0 || len(o.lines[key]) > 0 || len(o.crossingLocked(p)) > 0\n",
				"\tmust := waits > 0 || len(o.lines[key]) > 0\n",
			}},
			dir: "engine", test: "TestSeveralRoomsKeepTheOrderOfAStream",
		},
		{
			name:  "take who leaves one of several rooms out of all of them",
			file:  "engine/route/join.go",
			edits: []edit{{"m.Left = !slices.ContainsFunc(now, func", "m.Left = true || !slices.ContainsFunc(now, func"}},
			dir:   "engine", test: "TestSeveralRoomsWithChurn",
		},
		{
			name:  "send a push with a filter to a node that cannot filter",
			file:  "transport/link/options.go",
			edits: []edit{{"len(o.Filter) > 0 && !can.has(pubsub.Feature_FEATURE_FILTER)", "false"}},
			dir:   "transport/link", test: "TestANodeThatCannotFilterGetsNothing",
		},
		{
			name:  "take who is filtered on one node for filtered everywhere",
			file:  "engine/push.go",
			edits: []edit{{"d.names = d.Targets() > 1 && (d.healed || p.slow != nil && len(p.slow.shared) > 0)", "d.names = false"}},
			dir:   "engine", test: "TestEachFilteredUserCountsAsTheModelSays",
		},
	}
}
