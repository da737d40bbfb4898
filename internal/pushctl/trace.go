package pushctl

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// traceText is how long the stages of a push took, for people; "" where that was not asked for.
func traceText(x *pubsub.PushTrace) string {
	if x == nil {
		return ""
	}
	took := func(us uint32) string { return (time.Duration(us) * time.Microsecond).String() }
	var b strings.Builder
	fmt.Fprintf(&b, "  took %s: decode %s, route %s", took(x.GetTotalUs()), took(x.GetDecodeUs()), took(x.GetRouteUs()))
	if n := x.GetLookups(); n > 0 {
		fmt.Fprintf(&b, " with %s of %s at most", plural(int32(n), "look-up"), took(x.GetLookupUs()))
	}
	b.WriteString("\n")
	if len(x.GetDeliveries()) == 0 {
		return b.String()
	}
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "  NODE\tUSERS\tFROM\tQUEUE\tWIRE\tACK\tOUTCOME")
	for _, d := range x.GetDeliveries() {
		users := "all"
		if d.GetUsers() > 0 {
			users = strconv.Itoa(int(d.GetUsers()))
		}
		_, _ = fmt.Fprintf(table, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\n", clean(d.GetNodeId()), users, took(d.GetBeginUs()), took(d.GetQueueUs()), took(d.GetWireUs()), took(d.GetAckUs()), clean(d.GetOutcome()))
	}
	_ = table.Flush() // into memory
	return b.String()
}
